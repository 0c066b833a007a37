"""Who of several suspects is a culprit: replays in which what they made is repaired at birth."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from nanhunt.analysis import Suspect
from nanhunt.records import Trace

# So many suspects are tried one by one, in the order of time; more are rarely independent.
MOST = 8

Cured = Callable[[Collection[Suspect]], bool]


@dataclass(frozen=True, slots=True)
class Decision:
    """The culprits among the suspects, in order of time, and how that was found out."""

    culprits: tuple[Suspect, ...]
    note: str = ""


def decide(suspects: Sequence[Suspect], is_cured: Cured) -> Decision:
    """The earliest whose repair alone cures; else the smallest set that does.

    Args:
        suspects: in the order of time.
        is_cured: replays the step with the births of some of them repaired.
    """
    if len(suspects) < 2 or any(not suspect.events for suspect in suspects):
        return Decision(tuple(suspects[:1]))
    tried = suspects[:MOST]
    for suspect in tried:
        if is_cured([suspect]):
            return Decision(
                (suspect,),
                f"{_count(len(suspects) - 1, 'other birth')} on the way to it "
                f"{'does' if len(suspects) == 2 else 'do'} not matter: with this one repaired at "
                f"birth the step is finite (replayed)",
            )
    if not is_cured(suspects):
        return Decision(
            (suspects[0],),
            f"{len(suspects)} births reach the sinks and repairing all of them does not cure: the "
            f"first is named",
        )
    needed = list(suspects)
    for suspect in reversed(suspects):
        rest = [other for other in needed if other is not suspect]
        if rest and is_cured(rest):
            needed = rest
    return Decision(
        tuple(needed),
        f"{len(needed)} births are independent: repairing all of them at birth makes the step "
        f"finite, and with any one left it is not (replayed)",
    )


def first_of_step(trace: Trace) -> int:
    """Index of the first event of the step that is replayed, the last one of a trace."""
    last = trace.events[-1].step if trace.events else 0
    return next((event.index for event in trace.events if event.step == last), 0)


def indices(suspects: Collection[Suspect], trace: Trace) -> frozenset[int]:
    """The events of some suspects, counted from the first of the step that is replayed."""
    start = first_of_step(trace)
    return frozenset(e.index - start for suspect in suspects for e in suspect.events)


def is_replayable(suspects: Collection[Suspect], trace: Trace) -> bool:
    """Whether all of their births lie in the step that is replayed."""
    start = first_of_step(trace)
    return all(event.index >= start for suspect in suspects for event in suspect.events)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
