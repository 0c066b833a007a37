"""Where a number came from, and what became of it, element by element.

Followed on the tensors that a replay kept: up, from an operand of a culprit to the op that made its
value out of others; and down, from a result to the op that took it out of the forward.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nanhunt import measurement
from nanhunt.recorder.flow import storage_key
from nanhunt.recorder.kept import Kept, KeptCall, element
from nanhunt.recorder.schema import Call
from nanhunt.records import Ancestor, Birth, Inquiry, OpEvent

Where = tuple[int, ...]

# A chain of that many ops says enough; no real one seen was longer than ten.
_LONGEST = 16
_COPIES = frozenset(
    ["clone", "copy", "to_copy", "contiguous", "unsafe_view", "lift_fresh", "alias"]
)
_SIGNED = frozenset(["neg", "abs"])
_BOUNDS = frozenset(["clamp", "clamp_min", "clamp_max", "minimum", "maximum", "relu", "threshold"])
_SUMS = frozenset(
    [
        "sum",
        "mean",
        "linalg_vector_norm",
        "norm",
        "amax",
        "amin",
        "max",
        "min",
        "cumsum",
        "var",
        "std",
    ]
)
_MATMULS = frozenset(["mm", "bmm", "mv", "dot"])
_PRODUCTS = frozenset(["prod", "cumprod"])
_PASSING = _COPIES | _SUMS | _PRODUCTS | _BOUNDS
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
    lines = dict(_operands(guilty, position, where))
    result = None
    if call is not None and origin is not event and call.outputs:
        result = _laid(guilty.outputs[position], where, call.outputs[0])
        if result is not None:
            lines |= {
                f"{role} of {origin.op}": at for role, at in _inputs(call, call.outputs[0], result)
            }
    lineage = ((role, tuple(_climb(kept, *at))) for role, at in lines.items())
    removed = _removed(kept, call, result, first_backward) if call and result is not None else None
    value = element(call.outputs[0], result) if call and result is not None else None
    return Inquiry(
        lineage=tuple((role, chain) for role, chain in lineage if chain),
        result=value,
        removed_by=removed,
    )


At = tuple[Tensor, Where, int]


def _offending(guilty: KeptCall, birth: Birth | None) -> tuple[int, Where]:
    """The output that is not finite, by position, and the first such element in it."""
    if birth is not None:
        return birth.output, birth.indices[0] if birth.indices else ()
    for position, output in enumerate(guilty.outputs):
        found = measurement.first_indices(measurement.nonfinite_mask(output))
        if found:
            return position, found[0]
    return 0, ()


def _operands(guilty: KeptCall, position: int, where: Where) -> Iterator[tuple[str, At]]:
    """The operands of the guilty op at one of the offending elements."""
    output = guilty.outputs[position]
    call = guilty.call
    lists = {name: value[position] for name, value in call.named
             if isinstance(value, (list, tuple)) and len(value) > position
             and isinstance(value[position], Tensor)}  # fmt: skip
    single = Call(call.info, (), {**dict(call.named), **lists})
    yield from _inputs(KeptCall(guilty.event, single, guilty.outputs), output, where)


def _inputs(kept_call: KeptCall, output: Tensor, where: Where) -> Iterator[tuple[str, At]]:
    """The tensors among the arguments of a call, at the elements that made one of its output."""
    for role, value in kept_call.call.named:
        if isinstance(value, Tensor) and measurement.can_be_nonfinite(value):
            at = _source_of(kept_call.call, value, output, where)
            if at is not None:
                yield role, (value, at, kept_call.event)


def _laid(output: Tensor, where: Where, over: Tensor) -> Where | None:
    """An index of one tensor on another: the same where their shapes fit, else None."""
    if len(where) != output.dim():
        return None
    if output.shape == over.shape:
        return where
    return (
        _broadcast(where, over) if measurement.is_broadcastable(over.shape, output.shape) else None
    )


def _broadcast(where: Where, tensor: Tensor) -> Where:
    """The index in a tensor that was expanded to a larger shape."""
    tail = where[len(where) - tensor.dim() :]
    return tuple(0 if size == 1 else i for i, size in zip(tail, tensor.shape, strict=True))


def _source_of(call: Call, operand: Tensor, output: Tensor, where: Where) -> Where | None:
    """The element of an operand out of which an element of the output was made.

    Of a reduction, the one of its slice that decides: the smallest of a product, else the largest.
    """
    laid = _laid(output, where, operand)
    base = _base(call)
    is_laid = operand.shape == output.shape or call.info.is_pointwise
    if laid is not None and is_laid and base not in _PRODUCTS:
        return laid
    if base in _MATMULS:
        slices = _line_of(call, operand, where)
    elif base in _SUMS or base in _PRODUCTS or base.endswith("norm"):
        slices = _slice_of(call, operand, output, where)
    else:
        return None
    if slices is None:
        return None
    values = measurement.dense(operand.detach())[slices]
    magnitude = values.abs().float()
    if not magnitude.numel():
        return None
    flat = int(magnitude.argmin() if base in _PRODUCTS else magnitude.argmax())
    inner = (
        iter(torch.unravel_index(torch.tensor(flat), magnitude.shape))
        if magnitude.dim()
        else iter(())
    )
    return tuple(int(next(inner)) if isinstance(s, slice) else s for s in slices)


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
    named = dict(call.named)
    dims = named.get("dim")
    if dims is None or dims == []:
        reduced = set(range(operand.dim()))
    else:
        reduced = {d % max(operand.dim(), 1) for d in ([dims] if isinstance(dims, int) else dims)}
    if _base(call).startswith("cum") and isinstance(dims, int):
        axis = dims % operand.dim()
        return tuple(slice(0, i + 1) if d == axis else i for d, i in enumerate(where))
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


def _base(call: Call) -> str:
    return call.info.name.rsplit("::", maxsplit=1)[-1].strip("_")


# -- up --------------------------------------------------------------------------------------------


def _climb(kept: Kept, tensor: Tensor, where: Where, before: int) -> Iterator[Ancestor]:
    """From a number to the op that made it, through those that only passed it on."""
    for _ in range(_LONGEST):
        value = element(tensor, where)
        if value is None:
            return
        found = _writer(kept, tensor, where, before)
        dtype = measurement.dtype_name(tensor.dtype)
        if found is None:
            yield Ancestor("", value, dtype)
            return
        writer, output, at = found
        inputs = dict(_inputs(writer, output, at))
        operands = {role: element(t, index) for role, (t, index, _) in inputs.items()}
        known = tuple((role, number) for role, number in operands.items() if number is not None)
        yield Ancestor(
            writer.call.info.name, value, dtype, known, writer.call.numbers, writer.event
        )
        role = _followed(writer.call, value, dict(known))
        if role is None:
            return
        tensor, where, before = inputs[role]


def _writer(
    kept: Kept, tensor: Tensor, where: Where, before: int
) -> tuple[KeptCall, Tensor, Where] | None:
    """The call that wrote one element of a tensor, its output and the index in that."""
    position = _position(tensor, where)
    while True:
        writer = kept.writer_of(tensor, before)
        if writer is None or position is None:
            return None
        for output in writer.outputs:
            if storage_key(output) == storage_key(tensor):
                at = _index_at(output, position)
                if at is not None:
                    return writer, output, at
        before = writer.event  # it wrote to another part of the memory


def _position(tensor: Tensor, where: Where) -> int | None:
    """Where in its memory an element of a tensor stands."""
    if tensor.layout is not torch.strided:
        return None
    return int(tensor.storage_offset()) + sum(
        i * s for i, s in zip(where, tensor.stride(), strict=True)
    )


def _index_at(tensor: Tensor, position: int) -> Where | None:
    """The index of a tensor that stands at a position of its memory; None if none does."""
    if tensor.layout is not torch.strided:
        return None
    rest = position - int(tensor.storage_offset())
    strides = tensor.stride()
    index = [0] * tensor.dim()
    for d in sorted(range(tensor.dim()), key=lambda d: -strides[d]):
        if strides[d] > 0:
            index[d] = min(rest // strides[d], tensor.shape[d] - 1)
            rest -= index[d] * strides[d]
    return tuple(index) if rest == 0 and min(index, default=0) >= 0 else None


def _followed(call: Call, value: float, operands: dict[str, float]) -> str | None:
    """The operand that a value came from unchanged; None where the op made it."""
    base = _base(call)
    if base in _PASSING or base == "where":
        same = [role for role, number in operands.items() if number == value]
        return same[0] if same else None
    if base in _SIGNED:
        return next((role for role, number in operands.items() if abs(number) == abs(value)), None)
    if base == "div":
        return "self" if value == 0 == operands.get("self") else None
    if base == "mul" or base in _KEEP_ZERO or base in _MATMULS:
        return next((role for role, n in operands.items() if n == 0), None) if value == 0 else None
    return None


# -- down ------------------------------------------------------------------------------------------

_TAKE_AWAY = frozenset(["index", "masked_select", "index_put", "masked_fill", "nan_to_num"])


def _removed(kept: Kept, origin: KeptCall, where: Where, until: int) -> str | None:
    """The op of the forward that took one element of a result out of what follows."""
    alive: list[tuple[Tensor, Where]] = [(origin.outputs[0], where)]
    for later in kept.after(origin.event):
        if later.event >= until:
            return None
        if later.call.info.is_view:
            continue
        for role, operand in _tensors(later.call):
            at = _seen_in(operand, alive)
            if at is None:
                continue
            if _takes_away(later, role, operand, at):
                return later.call.info.name
            alive.extend(_passed_on(later, operand, at))
            break
    return None


def _passed_on(later: KeptCall, operand: Tensor, at: Where) -> Iterator[tuple[Tensor, Where]]:
    """The element of the output into which an element of an operand went; the first of several."""
    for output in later.outputs[:1]:
        if output.shape == operand.shape:
            yield output, at
        elif measurement.is_broadcastable(operand.shape, output.shape):
            yield output, (0,) * (output.dim() - operand.dim()) + at


def _tensors(call: Call) -> Iterator[tuple[str, Tensor]]:
    return ((role, value) for role, value in call.named if isinstance(value, Tensor))


def _seen_in(operand: Tensor, alive: list[tuple[Tensor, Where]]) -> Where | None:
    """The index at which an operand shows one of the elements that are followed."""
    for tensor, where in alive:
        if storage_key(tensor) == storage_key(operand) != 0:
            position = _position(tensor, where)
            return _index_at(operand, position) if position is not None else None
    return None


def _takes_away(later: KeptCall, role: str, operand: Tensor, at: Where) -> bool:
    """Whether a call drops or replaces the element of an operand."""
    base, named = _base(later.call), dict(later.call.named)
    if role == "condition" or role not in ("self", "other", "input"):
        return False
    if base == "where":
        chosen = _is_set(named.get("condition"), at)
        return chosen is not None and chosen != (role == "self")
    if base in _BOUNDS and later.outputs[0].shape == operand.shape:
        before, after = element(operand, at), element(later.outputs[0], at)
        return before is not None and before != after
    if base not in _TAKE_AWAY:
        return False
    if isinstance(named.get("indices"), (list, tuple)):
        axis, mask = next(
            ((d, t) for d, t in enumerate(named["indices"]) if t is not None), (0, None)
        )
        picked = _is_set(mask, at[axis:])
    else:
        picked = _is_set(named.get("mask"), at)
    if base in ("index", "masked_select"):
        return picked is False
    return base == "nan_to_num" or bool(picked)


def _is_set(mask: Any, at: Where) -> bool | None:
    """Whether a mask is true at an element, or a list of positions holds it; None: no telling."""
    if not isinstance(mask, Tensor):
        return None
    if mask.dtype != torch.bool:
        return bool((mask == at[0]).any()) if at else None
    if mask.dim() > len(at):
        return None
    # A mask of fewer dimensions picks whole rows; one that is expanded has them at the end.
    head = at[: mask.dim()]
    fits = all(i < size for i, size in zip(head, mask.shape, strict=True))
    return bool(mask[head if fits else _broadcast(at, mask)])
