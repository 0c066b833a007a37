"""What the ops of one replay were given and returned, kept to ask afterwards where a value is from.

A recorder keeps nothing as a rule. Once a culprit is known the step is replayed with this, and the
questions that its operands raise are answered from the real tensors: which op made this zero, out
of what, and what became of the result.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nanhunt import measurement
from nanhunt.recorder.flow import storage_key
from nanhunt.recorder.schema import Call, tensors_in


class KeptCall(NamedTuple):
    """One op as it ran. An operand that was written to later holds the later value.

    `written` are the memories that it wrote to: none where its outputs only look at an input's.
    """

    event: int
    call: Call
    outputs: list[Tensor]
    written: frozenset[int] = frozenset()


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
        written = _written(call, outputs)
        self._calls[index] = KeptCall(index, call, outputs, written)
        for memory in written:
            self._writers.setdefault(memory, []).append(index)
        if written:
            self._sizes[index] = sum(t.numel() * t.element_size() for t in outputs)
            self._budget -= self._sizes[index]
        while self._budget < 0 and self._oldest < index:
            self._calls.pop(self._oldest, None)
            self._budget += self._sizes.pop(self._oldest, 0)
            self._oldest += 1

    def get(self, index: int) -> KeptCall | None:
        """The call of an event; None where it was given up."""
        return self._calls.get(index)

    def writers_of(self, tensor: Tensor, before: int) -> Iterator[KeptCall | None]:
        """The calls before event `before` that wrote to a tensor's memory, the latest first.

        None stands for one that was given up.
        """
        writers = self._writers.get(storage_key(tensor), ())
        return (self._calls.get(i) for i in reversed(writers) if i < before)

    def overwriters_of(self, tensor: Tensor, since: int) -> Iterator[KeptCall]:
        """The calls from event `since` on that wrote to a tensor's memory in place."""
        writers = self._writers.get(storage_key(tensor), ())
        calls = (self._calls[i] for i in writers if i >= since and i in self._calls)
        return (call for call in calls if call.call.info.mutated)

    def after(self, index: int) -> Iterator[KeptCall]:
        """The calls after an event, in order."""
        return (self._calls[i] for i in range(index + 1, self._count) if i in self._calls)


def _written(call: Call, outputs: list[Tensor]) -> frozenset[int]:
    """The memories that a call wrote to; some ops return a view without saying so."""
    if call.info.is_view:
        return frozenset()
    mutated = {name for _, name in call.info.mutated}
    read = {storage_key(t) for name, value in call.named if name not in mutated
            for t in tensors_in((value,))}  # fmt: skip
    return frozenset(key for key in map(storage_key, outputs) if key and key not in read)


def element(tensor: Tensor, where: tuple[int, ...]) -> float | None:
    """The number at an index (of a complex one the magnitude); None where there is none."""
    if len(where) != tensor.dim() or not tensor.numel() or tensor.is_meta:
        return None
    if tensor.layout is not torch.strided:
        return None  # its values stand in another shape than its own
    value = measurement.dense(tensor.detach())[where].item()
    return abs(value) if isinstance(value, complex) else float(value)
