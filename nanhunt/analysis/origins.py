"""Which forward op made an autograd node, by the number that both bear."""

import bisect
from dataclasses import dataclass, field

from nanhunt.records import OpEvent, Trace


@dataclass(slots=True)
class Origins:
    """Looks the forward op up that made an autograd node."""

    trace: Trace
    # Each thread counts on its own: the makers of a number in order of time, and by thread all
    # numbers in order.
    by_number: dict[int, list[OpEvent]] = field(default_factory=dict)
    numbers: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for event in self.trace.events:
            # A number is shared by the ops that make no node after the one that made it, so the
            # earliest counts. In a backward only recomputed ops and the formulas of a backward
            # that is itself differentiated make nodes.
            if event.made is not None:
                makers = self.by_number.setdefault(event.made, [])
                if all(maker.thread != event.thread for maker in makers):
                    makers.append(event)
                    self.numbers.setdefault(event.thread, []).append(event.made)
        for numbers in self.numbers.values():
            numbers.sort()

    def of(self, event: OpEvent) -> OpEvent:
        """The forward op behind a backward event, or the event itself."""
        if event.number is None or event.phase == "forward":
            return event
        origin = self._maker(event, event.number)
        if origin is not None:
            is_inner = origin.frame is None and (origin.number or 0) < event.number
            return self.of(origin) if is_inner else origin
        # An in-place op on a view runs under a number that no forward event has.
        thread = event.made_in or 0
        numbers = self.numbers.get(thread, [])
        earlier = bisect.bisect_left(numbers, event.number)
        makers = self.by_number[numbers[earlier - 1]] if earlier else ()
        return next((maker for maker in makers if maker.thread == thread), event)

    def _maker(self, event: OpEvent, number: int) -> OpEvent | None:
        """The op that made the node; where its thread is unknown, one whose name fits, or main."""
        makers = self.by_number.get(number, [])
        if event.made_in is not None:
            return next((maker for maker in makers if maker.thread == event.made_in), None)
        makers = [m for m in makers if m.thread == 0 or _fit(m.op, event.node)]
        return max(makers, key=lambda m: (_fit(m.op, event.node), m.thread == 0), default=None)


def _fit(op: str, node: str | None) -> int:
    """How well the name of a node says that an op made it: 2 exactly, 1 perhaps, 0 not at all."""
    plain = op.removeprefix("aten::").replace("_", "").lower()
    name = (node or "").rpartition("Backward")[0].lower()
    return 2 if name == plain else int(bool(name) and plain.startswith(name))
