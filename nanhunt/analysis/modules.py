"""What each module did: its ops by dtype, what it returned, and the gradient that came back."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from nanhunt.analysis.origins import Origins
from nanhunt.records import ModuleFacts, Passage, Trace


def summarise_modules(trace: Trace) -> tuple[ModuleFacts, ...]:
    """One row per module of the model, in the order in which they first did something."""
    origins = Origins(trace)
    forward: dict[str, Counter[str]] = {}
    backward: dict[str, Counter[str]] = {}
    for event in trace.events:
        module = event.module if event.phase == "forward" else origins.of(event).module
        if module and event.dtype:
            counts = forward if event.phase == "forward" else backward
            counts.setdefault(module, Counter())[event.dtype] += 1
    passages: dict[str, list[Passage]] = {}
    for passage in trace.passages:
        passages.setdefault(passage.module, []).append(passage)
    # A module is left after its children, and it had begun before them: names sort that way.
    names = sorted({*forward, *backward, *passages})
    return tuple(
        _summary(name, passages.get(name, ()), forward.get(name), backward.get(name))
        for name in names
    )


def _norm(passages: Sequence[Passage]) -> float | None:
    """The norm of all gradients that arrived: NaN as soon as one was not finite."""
    if not passages:
        return None
    return (
        math.nan if any(p.nonfinite for p in passages) else math.hypot(*(p.size for p in passages))
    )


def _summary(
    name: str,
    passages: Iterable[Passage],
    forward: Counter[str] | None,
    backward: Counter[str] | None,
) -> ModuleFacts:
    out = [p for p in passages if p.direction == "forward"]
    seen = [p for p in out if not math.isnan(p.size)]  # some element of it is finite
    back = [p for p in passages if p.direction == "backward"]
    return ModuleFacts(
        module=name,
        forward=tuple((forward or Counter()).most_common()),
        backward=tuple((backward or Counter()).most_common()),
        largest=max((p.largest for p in seen), default=None),
        rms=math.sqrt(math.fsum(p.size**2 for p in seen) / len(seen)) if seen else None,
        gradient=_norm(back),
        nonfinite_out=sum(p.nonfinite for p in out),
        nonfinite_gradient=sum(p.nonfinite for p in back),
    )
