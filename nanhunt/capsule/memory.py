"""Memory: what tensors and arrays look at, so that strides and aliases come again.

Tensors are stored as views of regions. A region is a stretch of memory that the tensors of a
capsule look at; tensors that overlap share one, whatever object holds it. So a transposed, an
expanded and a shared tensor are again what they were, and only what is looked at is stored.
"""

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanhunt.capsule.contents import UnfitError

# The names of safetensors for what can be read without nanhunt, and the size of an element.
SAFE = {
    "float64": ("F64", 8), "float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2),
    "int64": ("I64", 8), "int32": ("I32", 4), "int16": ("I16", 2), "int8": ("I8", 1),
    "uint64": ("U64", 8), "uint32": ("U32", 4), "uint16": ("U16", 2), "uint8": ("U8", 1),
    "bool": ("BOOL", 1), "float8_e4m3fn": ("F8_E4M3", 1), "float8_e5m2": ("F8_E5M2", 1),
}  # fmt: skip
_PAIRS = {"complex128": "float64", "complex64": "float32"}
# What a tensor of a capsule may be of: everything but quantised numbers and bits without a meaning.
DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
    and not str(dtype).removeprefix("torch.").startswith(("q", "bit"))
}
_MOST_DIMENSIONS = 64
# An expanded tensor may be larger than its memory, within what a machine can think of.
MOST_ELEMENTS = 2**40


@dataclass(frozen=True, slots=True)
class View:
    """How a tensor or an array looks at a region; region -1: it has no elements.

    `offset` is in bytes; `strides` are in elements for a tensor and in bytes for an array.
    """

    region: int
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Region:
    """A stretch of memory: what it is called and looks like in the file, and its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    align: int
    chunks: Callable[[], Iterator[memoryview]]


@dataclass(frozen=True, slots=True)
class _Piece:
    """One tensor's or array's stretch of memory: from `low` to `high`, on a device."""

    place: str
    device: str
    low: int
    high: int
    first: int  # address of the first element
    view: View
    item: int  # bytes of an element; 1 for an array, which needs no alignment
    is_plain: bool
    read: Callable[[int, int], memoryview]


class Memory:
    """Collects what tensors and arrays look at, and lays it out in regions."""

    def __init__(self) -> None:
        self._pieces: list[_Piece] = []

    def add_tensor(self, tensor: Tensor, place: str) -> None:
        """Take a strided tensor; what cannot be looked at raises."""
        storage, item = tensor.untyped_storage(), tensor.element_size()
        start = storage.data_ptr()
        first = start + int(tensor.storage_offset()) * item
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
        high = first + _reach(shape, strides) * item
        if high > start + storage.nbytes():
            raise RuntimeError("its memory was given back")

        def read(low: int, end: int) -> memoryview:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            whole.set_(storage, low - start, (end - low,), (1,))
            content: Any = whole.cpu().numpy()
            return memoryview(content)

        dtype = str(tensor.dtype).removeprefix("torch.")
        is_plain = tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())
        view = View(-1, dtype, 0, shape, strides)
        self._pieces.append(
            _Piece(place, str(tensor.device), first, high, first, view, item, is_plain, read)
        )

    def add_array(self, array: np.ndarray[Any, Any], place: str) -> None:
        """Take an array of numbers, texts or times."""
        low, high = np.lib.array_utils.byte_bounds(array) if array.size else (0, 0)

        def read(start: int, end: int) -> memoryview:
            # The array is named so that it lives as long as what looks at its memory.
            return (
                memoryview((ctypes.c_uint8 * (end - start)).from_address(start))
                if (array.size)
                else memoryview(b"")
            )

        first = array.__array_interface__["data"][0]
        view = View(-1, array.dtype.str, 0, array.shape, array.strides)
        self._pieces.append(
            _Piece(place, "cpu", low, high, first, view, 1, is_plain=False, read=read)
        )

    def __len__(self) -> int:
        return len(self._pieces)

    def forget(self, count: int) -> None:
        """Forget all but the first that were taken."""
        del self._pieces[count:]

    def lay_out(self) -> tuple[list[View], list[Region]]:
        """The view of each that was taken, in that order, and the regions as the file has them."""
        groups = sorted(_merged(self._pieces), key=lambda group: -_align(self._of(group)))
        views = [piece.view for piece in self._pieces]
        regions: list[Region] = []
        taken: set[str] = set()
        for number, group in enumerate(groups):
            pieces = self._of(group)
            low = min(piece.low for piece in pieces)
            pad = low % _align(pieces) if any((p.first - low) % p.item for p in pieces) else 0
            for index, piece in zip(group, pieces, strict=True):
                view = piece.view
                offset = piece.first - low + pad
                views[index] = View(number, view.dtype, offset, view.shape, view.strides)
            regions.append(_region(pieces, low, pad, _unique(pieces[0].place, taken)))
        return views, regions

    def _of(self, group: Sequence[int]) -> list[_Piece]:
        return [self._pieces[index] for index in group]


def _merged(pieces: Sequence[_Piece]) -> list[list[int]]:
    """Indices of the pieces that overlap, group by group, each in the order of taking."""
    groups: list[list[int]] = []
    reach: dict[tuple[str, int], tuple[int, list[int]]] = {}
    order = sorted(range(len(pieces)), key=lambda i: (pieces[i].device, pieces[i].low))
    for index in order:
        piece = pieces[index]
        if piece.low == piece.high:
            continue
        # What does not lie on a multiple of its own size cannot share a region with others.
        key = (piece.device, index + 1 if piece.low % piece.item else 0)
        end, group = reach.get(key, (0, []))
        if piece.low >= end:
            group = []
            groups.append(group)
        group.append(index)
        reach[key] = (max(end, piece.high), group)
    ordered = [sorted(group) for group in groups]
    return sorted(ordered)


def _align(pieces: Sequence[_Piece]) -> int:
    return max(piece.item for piece in pieces)


def _region(pieces: Sequence[_Piece], low: int, pad: int, name: str) -> Region:
    high = max(piece.high for piece in pieces)
    size = high - low + pad
    dtype, shape = _appearance(pieces, low, size, pad)

    def chunks() -> Iterator[memoryview]:
        if pad:
            yield memoryview(bytes(pad))
        done = low
        for piece in sorted(pieces, key=lambda piece: piece.low):
            if piece.high > done:
                yield piece.read(done, piece.high)
                done = piece.high

    return Region(name, dtype, shape, size, _align(pieces), chunks)


def _appearance(
    pieces: Sequence[_Piece], low: int, size: int, pad: int
) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape in the file: those of the tensor where it is the whole region."""
    kinds = {piece.view.dtype for piece in pieces}
    name = _PAIRS.get(pieces[0].view.dtype, pieces[0].view.dtype)
    if len(kinds) > 1 or name not in SAFE or pad:
        return "U8", (size,)
    safe, item = SAFE[name]
    first = pieces[0]
    if first.is_plain and first.low == low and first.high - low == size:
        return safe, (*first.view.shape, 2) if first.view.dtype in _PAIRS else first.view.shape
    return safe, (size // item,)


def _unique(place: str, taken: set[str]) -> str:
    name, number = place, 1
    while name in taken or name == "__metadata__":
        number += 1
        name = f"{place}~{number}"
    taken.add(name)
    return name


def _reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    """How many elements lie between the first and the last, both included; 0: there are none."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * abs(s) for n, s in zip(shape, strides, strict=True))


def rebuild_tensor(view: View, regions: Sequence[Tensor]) -> Tensor:
    """The tensor that looks at a region as another one did.

    Raises:
        UnfitError: it would look beyond the region, or is of no dtype that a capsule holds.
    """
    dtype = DTYPES.get(view.dtype)
    if dtype is None:
        raise UnfitError(f"a tensor is of dtype {view.dtype[:40]!r}, which no capsule holds")
    _check_shape(view)
    if any(stride < 0 for stride in view.strides):
        raise UnfitError(f"a tensor has the strides {view.strides[:8]}, which cannot be")
    result = torch.empty(0, dtype=dtype)
    if 0 in view.shape:
        return result.as_strided(view.shape, view.strides)
    region = _region_of(view, regions)
    item = result.element_size()
    end = view.offset + _reach(view.shape, view.strides) * item
    if view.offset % item or end > region.numel():
        raise UnfitError(
            f"a tensor looks at bytes {view.offset} to {end} of a region of {region.numel()}"
        )
    storage = region.untyped_storage()
    result.set_(storage, view.offset // item, view.shape, view.strides)
    return result


def rebuild_array(view: View, regions: Sequence[Tensor]) -> np.ndarray[Any, Any]:
    """The array that looks at a region as another one did; raises as `rebuild_tensor`."""
    _check_shape(view)
    dtype = _array_dtype(view.dtype)
    if 0 in view.shape or view.region == -1:
        if math.prod(view.shape):
            raise UnfitError("an array has elements and no memory")
        return np.empty(view.shape, dtype)
    memory = _region_of(view, regions).numpy()
    try:
        return np.ndarray(view.shape, dtype, memory, view.offset, view.strides)
    except (ValueError, TypeError) as error:
        raise UnfitError(f"an array looks beyond its region ({error})") from None


def _array_dtype(text: str) -> np.dtype[Any]:
    kind, size = text[1:2], text[2:].partition("[")[0]
    if text[:1] not in "<>|=" or kind not in "biufcmMSU" or not size.isdigit() or len(text) > 20:
        raise UnfitError(f"an array is of dtype {text[:40]!r}, which no capsule holds")
    try:
        return np.dtype(text)
    except (TypeError, ValueError):
        raise UnfitError(f"an array is of dtype {text!r}, which numpy does not know") from None


def _check_shape(view: View) -> None:
    if len(view.shape) != len(view.strides) or len(view.shape) > _MOST_DIMENSIONS:
        raise UnfitError(f"a shape of {len(view.shape)} has strides of {len(view.strides)}")
    if any(n < 0 for n in view.shape) or math.prod(n or 1 for n in view.shape) > MOST_ELEMENTS:
        raise UnfitError(f"a tensor has the shape {view.shape[:8]}, larger than any that is stored")


def _region_of(view: View, regions: Sequence[Tensor]) -> Tensor:
    if not 0 <= view.region < len(regions) or view.offset < 0:
        raise UnfitError(f"a tensor looks at region {view.region}; there are {len(regions)}")
    return regions[view.region]
