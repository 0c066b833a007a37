"""Which terms of a loss fail: one backward each, and a smallest set whose absence cures."""

from collections.abc import Callable, Sequence
from typing import Any

from nanhunt.records import Sink, Trace
from nanhunt.replay import blame_terms
from nanhunt.subject import Subject

_MOST = 8  # that are taken out together


def accused_terms(subject: Subject, batch: Any, trace: Trace) -> list[str]:
    """The terms whose own backward is not finite at the first poisoned parameters."""
    sinks = [s for s in trace.nonfinite_sinks if s.kind == "gradient"]
    nearest: dict[str, Sink] = {}
    for sink in sorted(sinks, key=lambda s: min(s.last, default=0)):
        nearest.setdefault(sink.group, sink)
    finite = blame_terms(subject, batch, [sink.name for sink in nearest.values()])
    return [term for term, is_finite in finite.items() if not is_finite]


def smallest_cure(
    ranked: Sequence[str], cures: Callable[[Sequence[str]], bool]
) -> tuple[str, ...] | None:
    """A set of at least two names none of which can be put back; None if none was found.

    Names are taken out in their order until that cures, then put back one by one where it still
    does: delta debugging (A. Zeller, R. Hildebrandt, Simplifying and Isolating Failure-Inducing
    Input, IEEE TSE 28(2), 2002) with one name as the grain. One name at least stays in.
    """
    taken: list[str] = []
    for name in ranked[: min(len(ranked) - 1, _MOST)]:
        taken.append(name)
        if len(taken) > 1 and cures(taken):
            break
    else:
        return None
    for name in taken[:-1]:
        rest = [other for other in taken if other != name]
        if len(rest) > 1 and cures(rest):
            taken = rest
    return tuple(taken)
