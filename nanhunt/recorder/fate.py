"""What became of a number: down, to the op that took it out of the forward again."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor

from nanhunt import measurement
from nanhunt.recorder.flow import storage_key
from nanhunt.recorder.kept import (
    Kept,
    KeptCall,
    Where,
    base_of,
    broadcast_index,
    element,
    index_at,
    is_set,
    position_of,
)
from nanhunt.recorder.schema import tensors_in

COPIES = frozenset(["clone", "copy", "to_copy", "lift_fresh", "alias"])
BOUNDS = frozenset(["clamp", "clamp_min", "clamp_max", "minimum", "maximum", "relu", "threshold"])
_OVERWRITING = frozenset(["copy", "fill", "zero"])
_PICKING = frozenset(["index", "masked_select", "index_put", "masked_fill"])
# A number that is laid over a larger tensor goes to many places; so many are followed.
_MOST = 64
# The ops that begin a backward, at most.
_JUST_BEFORE = 8


def removed_by(kept: Kept, origin: KeptCall, where: Where, until: int) -> str | None:
    """The op that took one element of a result out of the forward, which ends at event `until`.

    None where it stays in: where it reaches the loss in some way.
    """
    trail = _Trail(origin.outputs[0].requires_grad)
    trail.add(origin.outputs[0], where)
    removed = None
    for later in kept.after(origin.event):
        if later.event >= until:
            break
        if later.written and trail.is_ended_by(later):
            removed = removed or later.call.info.name
    return None if trail.leads_to(_losses(kept, until)) else removed


def _losses(kept: Kept, until: int) -> set[int]:
    """The memories of what the backward starts from: a gradient of 1 is made for each."""
    last = (kept.get(until - back) for back in range(_JUST_BEFORE))
    return {
        storage_key(dict(call.call.named)["self"])
        for call in last
        if call is not None and base_of(call.call) == "ones_like"
    }


@dataclass(slots=True)
class _Trail:
    """Where a number went: element by element as long as it goes, then by memory.

    `alive` are the bytes at which it stands, by memory, and `reached` the memories into which it
    was mixed with others. With `by_grad`, only what the gradient comes back through counts.
    """

    by_grad: bool
    alive: dict[int, set[int]] = field(default_factory=dict)
    reached: set[int] = field(default_factory=set)

    def add(self, tensor: Tensor, where: Where) -> None:
        """Follow one more element."""
        at = position_of(tensor, where)
        held = self.alive.setdefault(storage_key(tensor), set())
        if at is not None and len(held) < _MOST and self._has_gradient(tensor):
            held.add(at)

    def leads_to(self, memories: set[int]) -> bool:
        """Whether the number has a part in a memory; if none is known, in anything."""
        if not memories:
            return bool(self.reached)
        return any(memory in self.reached or self.alive.get(memory) for memory in memories)

    def is_ended_by(self, later: KeptCall) -> bool:
        """Go one call on; whether it takes the number away."""
        is_taken = is_mixed = False
        ways: list[tuple[Tensor, Where]] = []
        for role, operand in _operands(later):
            if not measurement.can_be_nonfinite(operand) or not self._has_gradient(operand):
                continue
            is_mixed |= storage_key(operand) in self.reached
            seen = self._seen_in(operand)
            is_mixed |= bool(seen) and _is_overlapping(operand)
            for at in seen:
                to = _goes_to(later, role, operand, at)
                is_mixed |= to is None
                ways.extend((later.outputs[0], place) for place in to or ())
                if to == []:
                    is_taken = True
                    self._forget(later, operand, at)
        for way in ways:
            self.add(*way)
        if is_mixed and any(map(self._has_gradient, later.outputs)):
            self.reached |= later.written
        return is_taken

    def _has_gradient(self, tensor: Tensor) -> bool:
        return tensor.requires_grad or not self.by_grad

    def _seen_in(self, operand: Tensor) -> list[Where]:
        held = self.alive.get(storage_key(operand), ())
        seen = (index_at(operand, position) for position in held)
        return [place for where in seen if where is not None for place in _shown(operand, where)]

    def _forget(self, later: KeptCall, operand: Tensor, at: Where) -> None:
        memory, position = storage_key(operand), position_of(operand, at)
        if memory in later.written and position is not None:
            self.alive[memory].discard(position)


def _operands(later: KeptCall) -> Iterator[tuple[str, Tensor]]:
    for role, value in later.call.named:
        yield from ((role, tensor) for tensor in tensors_in((value,)))


def _goes_to(later: KeptCall, role: str, operand: Tensor, at: Where) -> list[Where] | None:
    """The elements of the output that an element of an operand goes to.

    Empty where the call drops or replaces it, None where it is mixed with others.
    """
    base, output = base_of(later.call), later.outputs[0]
    if role in ("self", "input") and base in _OVERWRITING | _PICKING:
        is_left = _is_left(later, operand, at)
        return None if is_left is None else [at] * is_left
    if (base in BOUNDS or base == "nan_to_num") and output.shape == operand.shape:
        return [] if _is_changed(base, operand, output, at) else [at]
    if not later.call.info.is_pointwise and base not in COPIES and base != "native_dropout":
        return None
    if not measurement.is_broadcastable(operand.shape, output.shape):
        return None
    to = _spread(operand, output, at)
    if base == "where":
        condition = dict(later.call.named)["condition"]
        return [place for place in to if is_set(condition, place) == (role == "self")]
    return to


def _is_left(later: KeptCall, operand: Tensor, at: Where) -> bool | None:
    """Whether an op that picks elements leaves one where it is; None where it puts it elsewhere."""
    base, named = base_of(later.call), dict(later.call.named)
    if base in _OVERWRITING:
        return False
    is_picked = _is_picked(named, operand, at)
    if base in ("index", "masked_select"):
        return False if is_picked is False else None
    return not is_picked or bool(named.get("accumulate"))


def _shown(operand: Tensor, at: Where) -> list[Where]:
    """Where an operand shows one element of its memory: in many places, if it is expanded."""
    pairs = zip(at, operand.stride(), operand.shape, strict=True)
    return _first([[i] if stride else range(size) for i, stride, size in pairs])


def _is_overlapping(operand: Tensor) -> bool:
    """Whether an operand shows an element of its memory in several windows, as unfold does."""
    axes = sorted(
        (s, n) for s, n in zip(operand.stride(), operand.shape, strict=True) if s and n > 1
    )
    reach = 0
    for stride, size in axes:
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _first(ranges: Sequence[Iterable[int]]) -> list[Where]:
    return list(islice(product(*ranges), _MOST))


def _spread(operand: Tensor, output: Tensor, at: Where) -> list[Where]:
    """The elements of an output over which one of an operand is laid; the first ones of many."""
    new = output.dim() - operand.dim()
    ranges: list[Iterable[int]] = [range(size) for size in output.shape[:new]]
    for i, size, wide in zip(at, operand.shape, output.shape[new:], strict=True):
        ranges.append([i] if size == wide else range(wide))
    return _first(ranges)


def _is_changed(base: str, operand: Tensor, output: Tensor, at: Where) -> bool:
    """Whether a bound took the place of an element, and with it of its gradient."""
    before, after = element(operand, at), element(output, at)
    if base == "relu":
        return after == 0  # its slope at 0 is 0
    # In place they are one and the same, also if NaN: there is no telling.
    return storage_key(operand) != storage_key(output) and before != after


def _is_picked(named: dict[str, Any], operand: Tensor, at: Where) -> bool | None:
    """Whether an index or a mask picks an element; None where there is no telling."""
    mask, indices = named.get("mask"), named.get("indices")
    if isinstance(mask, Tensor) and measurement.is_broadcastable(mask.shape, operand.shape):
        return bool(mask[broadcast_index(at, mask)])
    if not isinstance(indices, (list, tuple)):
        return None
    hits, axis = torch.tensor(True), 0
    for index in indices:
        if not isinstance(index, Tensor):
            axis += 1
            continue
        is_mask = index.dtype in (torch.bool, torch.uint8)
        for places in index.nonzero(as_tuple=True) if is_mask else (index,):
            hits = hits.to(places.device) & (places % operand.shape[axis] == at[axis])
            axis += 1
    return bool(hits.any())
