"""Numbers read off a tensor: the cheap screen, the exact counts, the operands of a birth.

Everything here is called below the recorder (or under `torch.no_grad()`), on tensors whose values
must not change; nothing here keeps a tensor alive.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nanhunt.records import Operand, Passage, Spectrum, TensorFacts

# Values and indices that a birth quotes: enough to see the pattern, few enough to read.
_QUOTED = 4
_FIRST_LOOK = 4096  # elements of a mask that are searched first


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """The dtype without its `torch.` prefix."""
    return str(dtype).removeprefix("torch.")


# Private names of torch that this stands on; checked with the versions in pyproject.toml.
_is_excluded: Callable[[Any], bool] = torch._C._dispatch_tls_is_dispatch_key_excluded  # noqa: SLF001
_PYTHON = torch._C.DispatchKey.Python  # noqa: SLF001

PLAIN = (Tensor, torch.nn.Parameter)  # the types of tensors with a memory of their own
_COMPLEX = frozenset([torch.complex32, torch.complex64, torch.complex128])
_WIDE = frozenset([torch.float32, torch.float64])
EXACT = frozenset(
    [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
)  # the dtypes of which most tensors are that need no look


def can_be_nonfinite(tensor: Tensor) -> bool:
    """Whether the dtype of the tensor has NaN at all."""
    if tensor.dtype in EXACT:
        return False
    return tensor.is_floating_point() or tensor.is_complex()


def has_values(tensor: Tensor) -> bool:
    """Whether there are numbers to look at: a tracer's stand-in for a tensor has none."""
    if tensor.is_meta or torch._is_functional_tensor(tensor):  # noqa: SLF001 - no public name
        return False
    if type(tensor).__name__ in ("FakeTensor", "FunctionalTensor"):
        return False
    return not is_shut(tensor) and not is_given_back(local(tensor))


def is_given_back(tensor: Tensor) -> bool:
    """Whether the memory of a tensor is gone while the tensor is there.

    `fully_shard` gives back that of whole parameters between their uses; to read it ends the
    process.
    """
    try:
        return tensor.untyped_storage().nbytes() == 0 and tensor.numel() > 0
    except (RuntimeError, NotImplementedError):  # it has no memory of its own
        return False


def is_shut(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor are anywhere but in its memory, and nobody knows where.

    Where the dispatcher that would know is off, reading them ends the process.
    """
    if type(tensor) in PLAIN or local(tensor) is not tensor or not _is_excluded(_PYTHON):
        return False
    try:
        return tensor.untyped_storage().data_ptr() == 0 and tensor.numel() > 0
    except RuntimeError:
        return True


def suspects(tensors: Sequence[Tensor]) -> list[int]:
    """Positions of the tensors that the screen cannot clear."""
    return [
        position
        for position, tensor in enumerate(tensors)
        if can_be_nonfinite(tensor)
        and (not is_given_back(tensor) if type(tensor) is Tensor else has_values(tensor))
        and is_suspect(dense(tensor))
    ]


def bad_among(tensors: Sequence[Tensor]) -> list[int]:
    """Positions of the tensors that hold NaN or an infinity; to be asked without gradients."""
    return [i for i in suspects(tensors) if not count(tensors[i]).is_finite]


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is spread over several processes."""
    return type(tensor) is not Tensor and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """The plain tensor in which the numbers are that this process can read without asking others.

    Of a distributed tensor that is its part here, of another one that is made of tensors the first
    with floating-point numbers. The tensor's own ways there go through the dispatcher, which may be
    switched off.
    """
    while type(tensor) not in PLAIN:
        inner = _inner(tensor)
        if inner is None:
            break
        tensor = inner
    return tensor


def _inner(tensor: Tensor) -> Tensor | None:
    held: Any = tensor
    if is_distributed(tensor):
        part: Tensor = held._local_tensor  # noqa: SLF001 - no public name that does not dispatch
        return part
    if not is_traceable_wrapper_subclass(tensor):
        return None
    parts = (getattr(held, name) for name in held.__tensor_flatten__()[0])
    tensors = (part for part in parts if isinstance(part, Tensor))
    return next(filter(can_be_nonfinite, tensors), None)


def dense(tensor: Tensor) -> Tensor:
    """The strided tensor that holds the values of a strided, sparse or distributed tensor."""
    tensor = local(tensor)
    if tensor.layout is torch.strided:
        # Forward-mode derivatives hold zeros that have no memory: reading them ends the process.
        return torch.zeros_like(tensor) if tensor._is_zerotensor() else tensor  # noqa: SLF001
    if tensor.layout is torch.sparse_coo:
        return tensor._values()  # noqa: SLF001 - the only way to the values of an uncoalesced one
    return tensor.values()


def is_suspect(tensor: Tensor) -> bool:
    """Whether one pass at memory speed cannot exclude a non-finite element.

    Never False on a tensor with a NaN or an infinity; may be True on large finite values, whose
    sum overflows. Measured: the sum takes a fortieth of the time of `isfinite(x).all()`, and at no
    size more than `dot(x, x)`. A look by numpy would be quicker on small tensors, but memory that
    numpy has seen can never be resized again.
    """
    if tensor.is_meta:
        return False
    value = _sum(tensor).item()
    return value - value != 0.0


def total(tensor: Tensor) -> Tensor | None:
    """A 0-dim tensor, where the tensor is, that is finite only if all of the tensor is.

    None where nothing can be non-finite. Nobody waits for it.
    """
    if not can_be_nonfinite(tensor) or not has_values(tensor):
        return None
    return _sum(dense(tensor).detach())


def _sum(tensor: Tensor) -> Tensor:
    if tensor.dtype in _WIDE:
        return tensor.sum()
    if tensor.dtype in _COMPLEX:
        return _sum(torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor))
    # float16 and narrower overflow on their own sums long before any element does.
    return tensor.sum(dtype=torch.float32)


def count(tensor: Tensor) -> TensorFacts:
    """Shape, dtype and the exact number of NaN, +inf and -inf; of elements, also if complex."""
    shape, dtype = tuple(tensor.shape), dtype_name(tensor.dtype)
    if not can_be_nonfinite(tensor) or not has_values(tensor):
        return TensorFacts(shape, dtype)
    values = dense(tensor)
    if not is_suspect(values):
        return TensorFacts(shape, dtype)
    return TensorFacts(shape, dtype, *_tally(values))


def _tally(values: Tensor) -> tuple[int, int, int]:
    """Number of NaN, +inf (complex: any infinity) and -inf.

    On a CPU numpy counts: its `isnan` and `count_nonzero` take a seventh of the time of torch's
    `isnan().sum()`.
    """
    if values.device.type != "cpu" or type(values) not in PLAIN:
        nan = torch.isnan(values)
        infinite = torch.isinf(values) & ~nan
        negative = values == -torch.inf if not values.is_complex() else torch.zeros_like(nan)
        counts = (int(torch.count_nonzero(mask)) for mask in (nan, infinite, negative))
        n_nan, n_inf, n_negative = counts
        return n_nan, n_inf - n_negative, n_negative
    array = _array(values)
    n_bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    n_nan = int(np.count_nonzero(np.isnan(array))) if n_bad else 0
    is_real = not values.is_complex()
    n_negative = int(np.count_nonzero(array == -np.inf)) if is_real and n_bad > n_nan else 0
    return n_nan, n_bad - n_nan - n_negative, n_negative


def _array(values: Tensor) -> "np.ndarray[Any, Any]":
    values = _widened(values.detach())  # numpy has no such dtypes
    array: np.ndarray[Any, Any] = values.resolve_conj().resolve_neg().numpy()
    return array


def _widened(values: Tensor) -> Tensor:
    """The same values in a dtype that every library knows, NaN and infinities included."""
    if values.dtype == torch.complex32:
        return values.to(torch.complex64)
    is_rare = values.is_floating_point() and values.element_size() == 1  # the float8 family
    return values.float() if is_rare or values.dtype == torch.bfloat16 else values


def read_passage(
    module: str, direction: Literal["forward", "backward"], tensor: Tensor
) -> Passage | None:
    """Largest magnitude and size of what passes a module; None where there is nothing to measure.

    The size is the root mean square of an output and the norm of a gradient. Both are of the finite
    elements, and NaN where there is none.
    """
    if not can_be_nonfinite(tensor) or tensor.is_meta or tensor.numel() == 0:
        return None
    values = dense(tensor).detach()
    if values.is_complex():
        values = values.abs()
    if values.dtype not in _WIDE:
        values = values.float()
    nonfinite = 0
    if is_suspect(values):
        finite = torch.isfinite(values)
        nonfinite = values.numel() - int(torch.count_nonzero(finite))
        values = torch.where(finite, values, 0)
        if nonfinite == values.numel():
            return Passage(module, direction, math.nan, math.nan, nonfinite)
    size = torch.linalg.vector_norm(values).item()
    if direction == "forward":
        size /= max(values.numel(), 1) ** 0.5
    low, high = values.aminmax()
    return Passage(module, direction, max(abs(low.item()), abs(high.item())), size, nonfinite)


def nonfinite_mask(tensor: Tensor) -> Tensor:
    """Boolean tensor of the same shape, True at NaN and infinities."""
    values = dense(tensor)
    if values.device.type != "cpu" or type(values) not in PLAIN:
        return ~torch.isfinite(values)
    return torch.from_numpy(np.asarray(~np.isfinite(_array(values))))


def kind_of(values: Tensor) -> Literal["nan", "inf", "nan and inf"]:
    """What the given non-finite values are."""
    values = _widened(values)
    nan, inf = bool(torch.isnan(values).any()), bool(torch.isinf(values).any())
    return "nan and inf" if nan and inf else "nan" if nan else "inf"


def first_indices(mask: Tensor) -> tuple[tuple[int, ...], ...]:
    """The first few indices at which a mask is True, in row-major order."""
    flat = mask.reshape(-1)
    found: list[int] = []
    start, size = 0, _FIRST_LOOK
    while start < flat.numel() and len(found) < _QUOTED:
        found += (start + torch.nonzero(flat[start : start + size])[:, 0]).tolist()[:_QUOTED]
        start, size = start + size, 8 * size  # often all is non-finite
    return tuple(_unravel(position, mask.shape) for position in found[:_QUOTED])


def _unravel(position: int, shape: Sequence[int]) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(shape):
        position, rest = divmod(position, size)
        index.append(rest)
    return tuple(reversed(index))


def leading_count(mask: Tensor) -> int | None:
    """In how many entries of the leading dimension a mask is True; None for a scalar."""
    if mask.dim() == 0:
        return None
    return int(mask.reshape(mask.shape[0], -1).any(1).sum())


def read_operand(role: str, tensor: Tensor, mask: Tensor | None) -> Operand:
    """Read one operand, all of it and where `mask` (the offending outputs) can be laid over it.

    Magnitudes stand for complex numbers. Non-finite elements of the operand are left out of
    `smallest` and `largest`.
    """
    facts = count(tensor)
    if not has_values(tensor):
        return Operand(role, facts)
    values = dense(tensor).detach()
    if values.numel() == 0 or values.is_quantized:
        return Operand(role, facts)
    if values.is_complex():
        values = values.abs()
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    finite = values[torch.isfinite(values)] if values.is_floating_point() else values
    limits = finite.aminmax() if finite.numel() and finite.dtype != torch.bool else None
    at = _values_at(values, mask)
    return Operand(
        role,
        facts,
        smallest=float(limits.min) if limits else None,
        largest=float(limits.max) if limits else None,
        zeros=int((values == 0).sum()),
        at=tuple(float(v) for v in at[:_QUOTED].tolist()) if at is not None else (),
        at_zero=_how_many(at, lambda v: v == 0),
        at_negative=_how_many(at, lambda v: v < 0),
        at_one=_how_many(at, lambda v: v.abs() == 1),
        smallest_normal=(
            torch.finfo(tensor.dtype).smallest_normal if can_be_nonfinite(tensor) else None
        ),
    )


def _values_at(values: Tensor, mask: Tensor | None) -> Tensor | None:
    if mask is None or not is_broadcastable(values.shape, mask.shape):
        return None
    at = values.expand(mask.shape)[mask]
    return at.to(torch.uint8) if at.dtype == torch.bool else at


def _how_many(values: Tensor | None, test: Callable[[Tensor], Tensor]) -> int | None:
    return None if values is None else int(test(values).sum())


def is_broadcastable(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of `shape` can be expanded to `to`."""
    if len(shape) > len(to):
        return False
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return all(small in (1, large) for small, large in pairs)


def newborn_mask(output: Tensor, inputs: Iterable[Tensor]) -> Tensor | None:
    """Where a pointwise output is non-finite although every input element there is finite.

    `inputs` are masks of non-finite elements. None where an input cannot be laid over the output.
    """
    born = nonfinite_mask(output)
    for mask in inputs:
        if not is_broadcastable(mask.shape, born.shape):
            return None
        born = born & ~mask
    return born


def read_spectrum(values: Tensor) -> Spectrum | None:
    """Ties, gaps and numerical rank of eigenvalues or singular values `[..., N]` as returned.

    They must be the recorded ones: recomputing them gives other rounding and so other ties.
    The floor of a spectrum is its smallest value; a value stands above it when it exceeds it by
    more than N times the rounding error of the largest.
    """
    if values.dim() == 0 or values.shape[-1] == 0 or not values.is_floating_point():
        return None
    n = values.shape[-1]
    ordered = values.detach().reshape(-1, n).sort(-1).values
    gaps = ordered.diff(dim=-1)
    tied = (gaps == 0).any(-1) if n > 1 else torch.zeros(len(ordered), dtype=torch.bool)
    scale = torch.finfo(values.dtype).eps * n * ordered.abs().amax(-1, keepdim=True)
    above = (ordered - ordered[:, :1] > scale).sum(-1)
    return Spectrum(
        matrices=len(ordered),
        size=n,
        tied=int(tied.sum()),
        largest_tie=_longest_tie(gaps),
        smallest_gap=float(gaps.min()) if gaps.numel() else float("inf"),
        floor=float(ordered[:, 0].median()),
        above_floor=int(above.median()),
        largest=float(ordered[:, -1].median()),
    )


def _longest_tie(gaps: Tensor) -> int:
    """Length of the longest run of identical neighbours, counted in values (1: no tie)."""
    longest, run = 1, torch.ones(gaps.shape[0], dtype=torch.long, device=gaps.device)
    for column in (gaps == 0).unbind(-1):
        run = torch.where(column, run + 1, torch.ones_like(run))
        longest = max(longest, int(run.max()))
    return longest
