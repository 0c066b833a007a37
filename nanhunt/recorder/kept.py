"""What the ops of one replay were given and returned, kept to ask afterwards where a value is from.

A recorder keeps nothing as a rule. Once a culprit is known the step is replayed with this, and the
questions that its operands raise are answered from the real tensors: which op made this zero, out
of what, and what became of the result.
"""

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from nanhunt import measurement
from nanhunt.recorder.flow import storage_key
from nanhunt.recorder.schema import Call, tensors_in

Where: TypeAlias = tuple[int, ...]


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
    groups: tuple[list[int], list[int]] = ([], [])  # that it read, and that it overwrote
    for name, value in call.named:
        groups[name in mutated].extend(map(storage_key, tensors_in((value,))))
    fresh = {*map(storage_key, outputs)}.difference(groups[0])
    return frozenset(fresh.union(groups[1]).difference([0]))


def element(tensor: Tensor, where: Where) -> float | None:
    """The number at an index (of a complex one the magnitude); None where there is none."""
    if len(where) != tensor.dim() or not tensor.numel() or tensor.is_meta:
        return None
    if tensor.layout is not torch.strided:
        return None  # its values stand in another shape than its own
    value = measurement.dense(tensor).detach()[where].item()
    return abs(value) if isinstance(value, complex) else float(value)


def position_of(tensor: Tensor, where: Where) -> int | None:
    """Where in its memory an element of a tensor stands, in bytes."""
    if tensor.layout is not torch.strided:
        return None
    steps = sum(i * s for i, s in zip(where, tensor.stride(), strict=True))
    return (int(tensor.storage_offset()) + steps) * tensor.element_size()


def index_at(tensor: Tensor, position: int) -> Where | None:
    """The index of a tensor that stands at a position of its memory; None if none does."""
    if tensor.layout is not torch.strided or not tensor.numel():
        return None
    rest = position // tensor.element_size() - int(tensor.storage_offset())
    strides = tensor.stride()
    index = [0] * tensor.dim()
    for d in sorted(range(tensor.dim()), key=lambda d: -strides[d]):
        if strides[d] > 0:
            index[d] = min(rest // strides[d], tensor.shape[d] - 1)
            rest -= index[d] * strides[d]
    return tuple(index) if rest == 0 and min(index, default=0) >= 0 else None


def broadcast_index(where: Where, tensor: Tensor) -> Where:
    """The index in a tensor that was expanded to a larger shape."""
    tail = where[len(where) - tensor.dim() :]
    return tuple(0 if size == 1 else i for i, size in zip(tail, tensor.shape, strict=True))


def is_set(mask: Tensor, where: Where) -> bool:
    """Whether a mask that is laid over a tensor is true at one of its elements."""
    return bool(mask[broadcast_index(where, mask)])


def base_of(call: Call) -> str:
    """The op without namespace, leading underscores and the in-place mark."""
    return call.info.name.rsplit("::", maxsplit=1)[-1].strip("_")
