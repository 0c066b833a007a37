"""What the ops of one replay were given and returned, kept to ask afterwards where a value is from.

A recorder keeps nothing as a rule. Once a culprit is known the step is replayed with this, and the
questions that its operands raise are answered from the real tensors: which op made this zero, out
of what, and what became of the result.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from nanhunt import measurement
from nanhunt.recorder.flow import storage_key
from nanhunt.recorder.schema import Call


class KeptCall(NamedTuple):
    """One op as it ran. An operand that was written to later holds the later value."""

    event: int
    call: Call
    outputs: list[Tensor]


class Kept:
    """The calls of a replay by index, and the last writer of every memory at every moment."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._calls: dict[int, KeptCall] = {}
        self._writers: dict[int, list[int]] = {}
        self._sizes: dict[int, int] = {}
        self._count = 0
        self._oldest = 0

    def add(self, call: Call, outputs: list[Tensor]) -> None:
        """Keep one call; the oldest ones are given up when the budget is spent."""
        index = self._count
        self._count += 1
        self._calls[index] = KeptCall(index, call, outputs)
        if not call.info.is_view:
            for tensor in outputs:
                self._writers.setdefault(storage_key(tensor), []).append(index)
            self._sizes[index] = sum(t.numel() * t.element_size() for t in outputs)
            self._budget -= self._sizes[index]
        while self._budget < 0 and self._oldest < index:
            self._calls.pop(self._oldest, None)
            self._budget += self._sizes.pop(self._oldest, 0)
            self._oldest += 1

    def get(self, index: int) -> KeptCall | None:
        """The call of an event; None where it was given up."""
        return self._calls.get(index)

    def writer_of(self, tensor: Tensor, before: int) -> KeptCall | None:
        """The last call before event `before` that wrote to the memory of a tensor, if kept."""
        writers = self._writers.get(storage_key(tensor), ())
        last = next((i for i in reversed(writers) if i < before), None)
        return self._calls.get(last) if last is not None else None

    def after(self, index: int) -> Iterator[KeptCall]:
        """The calls after an event, in order."""
        return (self._calls[i] for i in range(index + 1, self._count) if i in self._calls)


def element(tensor: Tensor, where: tuple[int, ...]) -> float | None:
    """The number at an index (of a complex one the magnitude); None where there is none."""
    if len(where) != tensor.dim() or not tensor.numel() or tensor.is_meta:
        return None
    value = measurement.dense(tensor.detach())[where].item()
    return abs(value) if isinstance(value, complex) else float(value)
