"""The walk back from the non-finite sinks: only what reaches a sink can be a culprit.

A step is full of harmless non-finite values (masks, initial values, branches not taken), so the
first one is no answer. The walk starts at the sinks, follows non-finite data alone, and stops where
finite data (or an infinity that was asked for) became non-finite.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nanhunt.causes import PICKS, base_name, is_collective
from nanhunt.records import OpEvent, Phase, Sink, Trace


@dataclass(frozen=True, slots=True)
class Stop:
    """Where the walk ended: the op that made the value, or the tensor that came with it."""

    phase: Phase
    event: OpEvent | None = None
    state: Sink | None = None

    @property
    def order(self) -> int:
        """Position in time; what was there before the step comes first."""
        return self.event.index if self.event is not None else -1


@dataclass(frozen=True, slots=True)
class Walk:
    """Every event on a non-finite way to a sink, and the places where such ways begin."""

    phase: Phase
    step: int
    sinks: tuple[Sink, ...]
    visited: frozenset[int]
    stops: tuple[Stop, ...]


def walk_back(trace: Trace) -> Walk | None:
    """Walk back from the sinks that were non-finite first; None when all are finite.

    They decide alone: gradients of a non-finite loss prove nothing more. Stops are in the order of
    time; infinities that were asked for count only where nothing else was met.
    """
    poisoned = trace.nonfinite_sinks
    if not poisoned:
        return None
    first = min(map(_rank, poisoned))
    sinks = tuple(sink for sink in poisoned if _rank(sink) == first)
    return _walk(trace, _PHASES[sinks[0].kind], sinks)


def is_cured(before: Trace, after: Trace) -> bool:
    """Whether the sinks that were non-finite first are finite in another replay of the step."""
    first, now = walk_back(before), walk_back(after)
    if first is None or now is None:
        return True
    return _rank(now.sinks[0]) > _rank(first.sinks[0])


def _rank(sink: Sink) -> tuple[int, int]:
    return sink.order, _KINDS.index(sink.kind)


_PHASES: Mapping[str, Phase] = {
    "loss": "forward",
    "gradient": "backward",
    "stepped": "optimizer",
}
_KINDS = list(_PHASES)


def _walk(trace: Trace, phase: Phase, sinks: tuple[Sink, ...]) -> Walk:
    visited: set[int] = set()
    made: list[Stop] = []
    asked: list[Stop] = []
    queue = [source for sink in sinks for source in sink.last]
    while queue:
        source = queue.pop()
        if source in visited:
            continue
        visited.add(source)
        if source < 0:
            state = trace.state[-1 - source]
            makers = [maker for maker in state.last if maker >= 0]
            queue.extend(makers)
            if not makers:
                (asked if state.asked else made).append(Stop("data", state=state))
            continue
        event = trace.events[source]
        if event.asked:
            asked.append(Stop(event.phase, event))
            queue.extend(_earlier(trace, event, phase))
            continue
        is_born = event.birth is not None or is_received(event)
        is_origin = is_born or _meets_kept_value(trace, event, phase)
        if is_origin:
            made.append(Stop(event.phase, event))
        if not is_origin or _continues(event):
            queue.extend(_earlier(trace, event, phase))
    stops = made or _turning_points(asked)
    step = trace.events[-1].step if trace.events else 0
    return Walk(phase, step, sinks, frozenset(visited), tuple(sorted(stops, key=lambda s: s.order)))


def _turning_points(asked: Sequence[Stop]) -> list[Stop]:
    """Where an infinity that was asked for, and is all that reached the sink, became its value.

    A mask is harmless among finite numbers. It is not any more once it is picked: there, else at
    the first op that computes with it, else where it was written down.
    """
    ordered = sorted(asked, key=lambda stop: stop.order)
    picks = [s for s in ordered if s.event and base_name(s.event.op) in PICKS]
    read = [s for s in ordered if s.event and s.event.parents]
    computed = [s for s in read if s.event and base_name(s.event.op) not in _COPIES]
    return (picks or computed or read or ordered)[:1]


# What only hands a value on, as a cast does.
_COPIES = ("to_copy", "copy", "clone", "lift_fresh", "alias", "detach", "cat", "stack", "expand")


def _meets_kept_value(trace: Trace, event: OpEvent, phase: Phase) -> bool:
    """Whether a backward op read non-finite values that the forward had left (and hidden) alone.

    The loss is finite, so the forward was not at fault: the node that lets the value out of finite
    gradients is. A node whose incoming gradient was non-finite already passed that on.
    """
    if phase != "backward" or event.phase != "backward" or not event.parents:
        return False
    return all(_is_kept(trace, event, source) for source in event.parents)


def _continues(event: OpEvent) -> bool:
    """Whether an op that made a non-finite value also passed another one on."""
    return event.birth is not None and not event.birth.from_asked and bool(event.parents)


def _earlier(trace: Trace, event: OpEvent, phase: Phase) -> Iterable[int]:
    """What left the non-finite values that an event read.

    The loss is finite where a gradient decides, so a backward has no business with what the forward
    of its step had left, and hidden: there the way ends.
    """
    if phase == "forward" or event.phase != "backward":
        return event.parents
    return [source for source in event.parents if not _is_kept(trace, event, source)]


def is_received(event: OpEvent) -> bool:
    """Whether a collective brought a value that this rank had not given to it."""
    return is_collective(event.op) and not event.parents


def _is_kept(trace: Trace, event: OpEvent, source: int) -> bool:
    """Whether a backward read something that the forward had left, as data or as its own result.

    A gradient that an earlier backward left in `.grad`, or that this one was handed, is what
    arrives and not what was kept.
    """
    if source < 0:
        return event.node != "AccumulateGrad" and trace.state[-1 - source].kind != "gradient"
    earlier = trace.events[source]
    return earlier.phase == "forward" and earlier.step == event.step


def way_to_sink(trace: Trace, walk: Walk, start: OpEvent) -> tuple[OpEvent, ...]:
    """The shortest way, over non-finite data, from an event to the first poisoned sink."""
    ends = {source for sink in walk.sinks for source in sink.last}
    children: dict[int, list[int]] = {}
    for index in sorted(walk.visited):
        if index >= 0:
            for parent in trace.events[index].parents:
                children.setdefault(parent, []).append(index)
    before: dict[int, int | None] = {start.index: None}
    queue = [start.index]
    for current in queue:
        if current in ends:
            way = [current]
            while (previous := before[way[-1]]) is not None:
                way.append(previous)
            return tuple(trace.events[index] for index in reversed(way))
        for child in children.get(current, ()):
            if child not in before:
                before[child] = current
                queue.append(child)
    return (start,)
