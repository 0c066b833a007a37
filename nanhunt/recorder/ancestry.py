"""Where a number came from, element by element: up, on the tensors that a replay kept.

From an operand of a culprit to the op that made its value out of others; `fate` goes down.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nanhunt import measurement
from nanhunt.recorder.fate import BOUNDS, COPIES, removed_by
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
from nanhunt.recorder.schema import Call
from nanhunt.records import Ancestor, Birth, Inquiry, OpEvent

# A chain of that many ops says enough; no real one seen was longer than ten.
_LONGEST = 16
_SIGNED = frozenset(["neg", "abs"])
_SUMS = frozenset(
    ["sum", "mean", "linalg_vector_norm", "norm", "amax", "amin", "max", "min", "cumsum", "var",
     "std"]
)  # fmt: skip
# Operands that say which elements, and are no numbers that the result is made of.
_CHOOSING = frozenset(["condition", "index", "indices", "mask", "target"])
_PICKS = frozenset(["index", "index_select", "gather"])
_MATMULS = frozenset(["mm", "bmm", "mv", "dot"])
_PRODUCTS = frozenset(["prod", "cumprod"])
_EXTREMES = frozenset(["amax", "amin", "max", "min"])
# Ops that are not said to be pointwise, but whose operands lie over their output.
_LAID = frozenset(
    ["copy", "to_copy", "softmax", "log_softmax", "safe_softmax", "softmax_backward_data",
     "log_softmax_backward_data", "native_dropout", "triu", "tril"]
)  # fmt: skip
_JOINS = frozenset(["cat", "stack"])
_PASSING = COPIES | _SUMS | _PRODUCTS | BOUNDS | _PICKS | _JOINS
# Ops whose output can be 0 where all they were given is not 0 count as the makers of a 0; these
# pass a 0 on.
_KEEP_ZERO = frozenset(["sqrt", "pow", "square", "sin", "tanh", "log1p", "expm1", "sign", "relu"])


def inquire(kept: Kept, event: OpEvent, origin: OpEvent, first_backward: int) -> Inquiry:
    """Ask the kept tensors about one culprit.

    Args:
        kept: of a replay of the same step.
        event: the op that made the non-finite value.
        origin: the forward op behind it, which may be the same.
        first_backward: index of the first event of the backward; the forward ends there.
    """
    guilty, call = kept.get(event.index), kept.get(origin.index)
    if guilty is None or not guilty.outputs:
        return Inquiry()
    position, where = _offending(guilty, event.birth)
    lines = dict(_operands(kept, guilty, position, where))
    result = None
    if call is not None and origin is not event and call.outputs:
        result = _result_of(call, guilty.outputs[position], where)
        if result is not None:
            lines |= {
                f"{role} of {origin.op}": at
                for role, at in _inputs(kept, call, call.outputs[0], result)
            }
    lineage = ((role, tuple(_climb(kept, *at))) for role, at in lines.items())
    removed = value = None
    if call is not None and result is not None:
        # What a checkpoint computes again in the backward has its own forward there.
        is_again = origin.index >= first_backward
        removed = removed_by(kept, call, result, event.index if is_again else first_backward)
        if not _is_overwritten(kept, call.outputs[0], result, origin.index + 1):
            value = element(call.outputs[0], result)
    return Inquiry(
        lineage=tuple((role, chain) for role, chain in lineage if chain),
        result=value,
        removed_by=removed,
    )


At = tuple[Tensor, Where, int]


def _offending(guilty: KeptCall, birth: Birth | None) -> tuple[int, Where]:
    """The output that is not finite, by position, and one such element in it.

    One at which an operand is 0, if there is any: a zero tells why, and beside it stand numbers
    that are only nearly so.
    """
    if birth is not None:
        quoted = [operand.at for operand in birth.operands if operand.at_zero]
        at_zero = (place for at in quoted for place, value in enumerate(at) if value == 0)
        first = next(at_zero, 0)
        return birth.output, birth.indices[first] if birth.indices else ()
    for position, output in enumerate(guilty.outputs):
        found = measurement.first_indices(measurement.nonfinite_mask(output))
        if found:
            return position, found[0]
    return 0, ()


def _operands(
    kept: Kept, guilty: KeptCall, position: int, where: Where
) -> Iterator[tuple[str, At]]:
    """The operands of the guilty op at one of the offending elements."""
    output = guilty.outputs[position]
    call = guilty.call
    lists = {name: value[position] for name, value in call.named
             if isinstance(value, (list, tuple)) and len(value) > position
             and isinstance(value[position], Tensor)}  # fmt: skip
    if base_of(call) not in _JOINS:  # one of many lists: the operands of one tensor of a `foreach`
        call = Call(call.info, (), {**dict(call.named), **lists})
    yield from _inputs(kept, guilty._replace(call=call), output, where)


def _inputs(
    kept: Kept, kept_call: KeptCall, output: Tensor, where: Where
) -> Iterator[tuple[str, At]]:
    """The tensors among the arguments of a call, at the elements that made one of its output.

    Without those that hold another value by now.
    """
    if base_of(kept_call.call) in _JOINS:
        joined = _part(kept_call.call, where)
        if joined is not None and not _is_overwritten(kept, *joined, kept_call.event):
            yield "tensors", (*joined, kept_call.event)
        return
    for role, value in kept_call.call.named:
        if isinstance(value, Tensor) and role not in _CHOOSING:
            at = _source_of(kept_call.call, value, output, where)
            if at is not None and not _is_overwritten(kept, value, at, kept_call.event):
                yield role, (value, at, kept_call.event)


def _is_overwritten(kept: Kept, tensor: Tensor, where: Where, since: int) -> bool:
    """Whether an op wrote to an element, from event `since` on."""
    position = position_of(tensor, where)
    written = (w for later in kept.overwriters_of(tensor, since) for w in later.outputs)
    return any(
        storage_key(w) == storage_key(tensor)
        and (position is None or index_at(w, position) is not None)
        for w in written
    )


def _laid(output: Tensor, where: Where, over: Tensor) -> Where | None:
    """An index of one tensor on another: the same where their shapes fit, else None."""
    if len(where) != output.dim():
        return None
    if output.shape == over.shape:
        return where
    return (
        broadcast_index(where, over)
        if measurement.is_broadcastable(over.shape, output.shape)
        else None
    )


def _result_of(call: KeptCall, output: Tensor, where: Where) -> Where | None:
    """The element of a forward op's result to which an element in its backward belongs."""
    result = call.outputs[0]
    of = dict(call.call.named).get("self")
    is_reduction = base_of(call.call) in _SUMS | _PRODUCTS
    if not is_reduction or not isinstance(of, Tensor) or output.shape == result.shape:
        return _laid(output, where, result)
    if output.shape != of.shape or len(where) != of.dim():
        return None
    reduced, keeps = _reduced(call.call, of), result.dim() == of.dim()
    return tuple(0 if d in reduced else i for d, i in enumerate(where) if keeps or d not in reduced)


def _source_of(call: Call, operand: Tensor, output: Tensor, where: Where) -> Where | None:
    """The element of an operand out of which an element of the output was made.

    Of a reduction, the one of its slice that decides: the smallest of a product and of a minimum,
    else the largest.
    """
    base = base_of(call)
    if operand.layout is not torch.strided:
        return None
    if call.info.is_pointwise or base in _LAID or base.startswith("foreach_"):
        return _laid(output, where, operand)
    if base in _PICKS:
        return _picked(call, operand, where) if operand is dict(call.named)["self"] else None
    if base in _MATMULS:
        slices = _line_of(call, operand, where)
    elif base in _SUMS or base in _PRODUCTS:
        slices = _slice_of(call, operand, output, where)
    else:
        return None
    values = operand.detach()[slices] if slices is not None else operand[:0]
    if slices is None or not values.numel():
        return None
    is_signed = base in _EXTREMES or values.dtype == torch.bool
    sizes = values.float() if is_signed else values.abs().float()
    flat = sizes.argmin() if base in _PRODUCTS or base.endswith("min") else sizes.argmax()
    inner = iter(torch.unravel_index(flat, sizes.shape) if sizes.dim() else ())
    return tuple(int(next(inner)) if isinstance(s, slice) else s for s in slices)


def _part(call: Call, where: Where) -> tuple[Tensor, Where] | None:
    """Which of the tensors that an op put together made an element of its output, and where."""
    named = dict(call.named)
    parts: list[Tensor] = [part for part in named["tensors"] if part.numel()]
    if not where or not parts:
        return None
    axis = int(named.get("dim", 0)) % len(where)
    at = where[axis]
    if base_of(call) == "stack":
        return parts[at], (*where[:axis], *where[axis + 1 :])
    for part in parts:
        if at < part.shape[axis]:
            return part, (*where[:axis], at, *where[axis + 1 :])
        at -= part.shape[axis]
    return None


def _picked(call: Call, operand: Tensor, where: Where) -> Where | None:
    """The element of its first operand that an op picked for an element of its output."""
    named, base = dict(call.named), base_of(call)
    if not operand.dim():
        return ()
    if base != "index":
        axis, index = named["dim"] % operand.dim(), named["index"]
        chosen = index[where] if base == "gather" else index.reshape(-1)[where[axis]]
        return (*where[:axis], int(chosen), *where[axis + 1 :])
    given = [(axis, mask) for axis, mask in enumerate(named["indices"]) if mask is not None]
    if len(given) != 1:
        return None
    axis, mask = given[0]
    if mask.dtype == torch.bool:  # a mask of several dimensions makes one of them
        return (*where[:axis], *mask.nonzero()[where[axis]].tolist(), *where[axis + 1 :])
    at, rest = where[axis : axis + mask.dim()], where[axis + mask.dim() :]
    return (*where[:axis], int(mask[at]) % operand.shape[axis], *rest)


def _line_of(call: Call, operand: Tensor, where: Where) -> tuple[Any, ...] | None:
    """The row or the column of an operand that a matrix product made into one element."""
    factors = [value for name, value in call.named if name != "bias"]
    if len(factors) < 2 or not where:
        return None
    if operand is factors[0]:
        return (*where[: operand.dim() - 1], slice(None))
    if operand.dim() == 1:
        return (slice(None),)
    return (*where[: operand.dim() - 2], slice(None), where[-1])


def _slice_of(call: Call, operand: Tensor, output: Tensor, where: Where) -> tuple[Any, ...] | None:
    """The part of an operand that a reduction made into one element of its output."""
    reduced = _reduced(call, operand)
    if base_of(call).startswith("cum"):
        return tuple(slice(0, i + 1) if d in reduced else i for d, i in enumerate(where))
    keeps = output.dim() == operand.dim()
    rest = iter(where)
    picked: list[Any] = []
    for d in range(operand.dim()):
        if d in reduced:
            picked.append(slice(None))
            if keeps:
                next(rest, None)
        else:
            picked.append(next(rest, None))
    return None if None in picked else tuple(picked)


def _reduced(call: Call, operand: Tensor) -> set[int]:
    """The dimensions of an operand that a reduction goes over."""
    dims = dict(call.named).get("dim")
    if dims is None or dims == []:
        return set(range(operand.dim()))
    return {d % max(operand.dim(), 1) for d in ([dims] if isinstance(dims, int) else dims)}


# -- up --------------------------------------------------------------------------------------------


def _climb(kept: Kept, tensor: Tensor, where: Where, before: int) -> Iterator[Ancestor]:
    """From a number to the op that made it, through those that only passed it on."""
    for _ in range(_LONGEST):
        value = element(tensor, where)
        if value is None:
            return
        is_known, found = _writer(kept, tensor, where, before)
        if not is_known:
            return
        dtype = measurement.dtype_name(tensor.dtype)
        if found is None:
            yield Ancestor("", value, dtype)
            return
        writer, output, at = found
        if output.is_complex() != tensor.is_complex():
            return  # it made both parts, and this is one
        inputs = dict(_inputs(kept, writer, output, at))
        operands = {role: element(t, index) for role, (t, index, _) in inputs.items()}
        known = tuple((role, number) for role, number in operands.items() if number is not None)
        yield Ancestor(
            writer.call.info.name, value, dtype, known, writer.call.numbers, writer.event
        )
        role = _followed(writer.call, value, dict(known), at)
        if role is None:
            return
        tensor, where, before = inputs[role]


def _writer(
    kept: Kept, tensor: Tensor, where: Where, before: int
) -> tuple[bool, tuple[KeptCall, Tensor, Where] | None]:
    """The call that wrote one element of a tensor, its output and the index in that.

    The first value is False where that cannot be told, since a call was given up.
    """
    position = position_of(tensor, where)
    if position is None:
        return False, None
    for writer in kept.writers_of(tensor, before):
        if writer is None:
            return False, None
        for output in writer.outputs:
            if storage_key(output) == storage_key(tensor):
                at = index_at(output, position)
                if at is not None:
                    return True, (writer, output, at)
        # It wrote to another part of the memory.
    return True, None


def _followed(call: Call, value: float, operands: dict[str, float], at: Where) -> str | None:
    """The operand that a value came from unchanged; None where the op made it."""
    base = base_of(call)
    if base == "where":
        chosen = "self" if is_set(dict(call.named)["condition"], at) else "other"
        return chosen if chosen in operands else None
    if base in _PASSING:
        same = [role for role, number in operands.items() if number == value]
        return same[0] if same else None
    if base in _SIGNED:
        return next((role for role, number in operands.items() if abs(number) == abs(value)), None)
    if base == "div":
        return "self" if value == 0 == operands.get("self") else None
    if base == "mul" or base in _KEEP_ZERO or base in _MATMULS:
        return next((role for role, n in operands.items() if n == 0), None) if value == 0 else None
    return None
