"""Reading a spelling back: plain data in, plain data out; nothing is looked up by name."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nanhunt.capsule.contents import Absent, UnfitError
from nanhunt.capsule.lookalikes import make_record, make_tuple
from nanhunt.capsule.memory import View, rebuild_array, rebuild_tensor
from nanhunt.capsule.spelling import DEPTH, Node

_COMPRESSED = {
    str(layout).removeprefix("torch."): layout
    for layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
}
# Not `getattr(torch, name)`: torch answers some names by importing something.
_EVERY_DTYPE = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}
_FLOATS = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
_MOST_DIGITS = 40


class Reader:
    """Reads what a `Speller` spelled; each word that it does not know is an `UnfitError`."""

    def __init__(
        self, views: Sequence[View], tensors: Sequence[Node], regions: Sequence[Tensor]
    ) -> None:
        self._views, self._tensors, self._regions = views, tensors, regions
        self._made: dict[int, Tensor] = {}
        self._arrays: dict[tuple[Any, ...], np.ndarray[Any, Any]] = {}
        self._depth = 0

    def read(self, node: Node) -> Any:
        """The value that a node spells."""
        if node is None or type(node) in (bool, str, float):
            return node
        if type(node) is int:
            return _whole(node)
        if not isinstance(node, list) or not node or not isinstance(node[0], str):
            raise UnfitError(f"{_shown(node)} spells no value")
        word = _WORDS.get(node[0])
        if word is None:
            raise UnfitError(f"{_shown(node[0])} is no kind of value that this nanhunt knows")
        self._depth += 1
        if self._depth > DEPTH + 8:
            raise UnfitError(f"it is nested more than {DEPTH} deep")
        value = word(self, node[1:])
        self._depth -= 1
        return value

    def _all(self, nodes: Any) -> list[Any]:
        return [self.read(node) for node in _list(nodes)]

    # -- words -------------------------------------------------------------------------------

    def _dict(self, nodes: list[Node]) -> dict[Any, Any]:
        pairs: dict[Any, Any] = {}
        for node in nodes:
            key, item = _exactly(node, 2)
            if type(key) not in (str, int, bool):
                raise UnfitError(f"{_shown(key)} is no key of a mapping")
            pairs[key] = self.read(item)
        return pairs

    def _named(self, nodes: list[Node]) -> Any:
        return self._typed(nodes, make_tuple)

    def _record(self, nodes: list[Node]) -> Any:
        return self._typed(nodes, make_record)

    def _typed(self, nodes: list[Node], make: Callable[..., Any]) -> Any:
        name, fields, items = _exactly(nodes, 3)
        texts = tuple(_text(field) for field in _list(fields))
        values = self._all(items)
        if len(texts) != len(values):
            raise UnfitError(f"{_shown(name)} has {len(texts)} fields and {len(values)} values")
        return make(_text(name), texts, values)

    def _numbers(self, nodes: list[Node]) -> Any:
        word, node = _exactly(nodes, 2)
        values = self._array_of(node).tolist()
        return values if word == "list" else tuple(values)

    def _array_of(self, node: Node) -> np.ndarray[Any, Any]:
        array = self.read(node)
        if not isinstance(array, np.ndarray) or array.ndim != 1:
            raise UnfitError(f"{_shown(node)} is no row of numbers")
        # A row that repeats itself would become a list larger than the file.
        if array.size > 1 and array.strides[0] < array.itemsize:
            raise UnfitError("a row of numbers overlaps itself")
        return array

    def _bytes(self, nodes: list[Node]) -> bytes:
        (node,) = _exactly(nodes, 1)
        return self._array_of(node).tobytes()

    def _scalar(self, nodes: list[Node]) -> Any:
        dtype, digits = (_text(node) for node in _exactly(nodes, 2))
        if len(digits) > 2**16:
            raise UnfitError("a scalar of numpy is longer than any is")
        content = torch.tensor(list(bytes.fromhex(digits)), dtype=torch.uint8)
        return rebuild_array(View(0, dtype, 0, (), ()), [content])[()]

    def _array(self, nodes: list[Node]) -> np.ndarray[Any, Any]:
        key = tuple(map(_plain, nodes))
        if key not in self._arrays:
            array = rebuild_array(self._view(key[0] if key else None), self._regions)
            array.flags.writeable = "fixed" not in key[1:]
            self._arrays[key] = array
        return self._arrays[key]

    def _view(self, number: Any) -> View:
        if type(number) is not int or not 0 <= number < len(self._views):
            raise UnfitError(f"there is no view {_shown(number)}; there are {len(self._views)}")
        return self._views[number]

    def _tensor(self, nodes: list[Node]) -> Tensor:
        (number,) = _exactly(nodes, 1)
        if type(number) is not int or not 0 <= number < len(self._tensors):
            raise UnfitError(f"there is no tensor {_shown(number)}; there are {len(self._tensors)}")
        if number not in self._made:
            word, *rest = _list(self._tensors[number]) or [None]
            self._made[number] = self._strided(rest) if word == "view" else self._sparse(word, rest)
        return self._made[number]

    def _strided(self, nodes: list[Node]) -> Tensor:
        number, *flags = nodes or [None]
        tensor = rebuild_tensor(self._view(number), self._regions)
        if "conj" in flags and tensor.is_complex():
            tensor = tensor.conj()
        if "neg" in flags:
            tensor = torch._neg_view(tensor)  # noqa: SLF001 - what `.conj().imag` makes
        can_learn = tensor.is_floating_point() or tensor.is_complex()
        wants = "grad" in flags and can_learn
        if "parameter" in flags:
            return nn.Parameter(tensor, requires_grad=wants)
        return tensor.requires_grad_(wants) if wants else tensor

    def _sparse(self, layout: Any, nodes: list[Node]) -> Tensor:
        self._depth += 1  # its parts are tensors, which could name each other
        if self._depth > DEPTH:
            raise UnfitError("a sparse tensor is made of itself")
        shape, parts, *flags = nodes if len(nodes) > 1 else (None, None)
        size = tuple(_whole(n) for n in _list(shape))
        tensors = self._all(parts)
        self._depth -= 1
        made = _joined(layout, size, tensors, is_coalesced="coalesced" in flags)
        return made.requires_grad_("grad" in flags)


_WORDS: Mapping[str, Callable[[Reader, list[Node]], Any]] = {
    "float": lambda _, nodes: _float(nodes),
    "complex": lambda _, nodes: complex(*(float(_text(n)) for n in _exactly(nodes, 2))),
    "dtype": lambda _, nodes: _dtype(nodes),
    "device": lambda _, nodes: torch.device(*map(_text, _exactly(nodes, 1))),
    "size": lambda _, nodes: torch.Size(map(_whole, nodes)),
    "list": lambda reader, nodes: reader._all(nodes),  # noqa: SLF001 - its own words
    "tuple": lambda reader, nodes: tuple(reader._all(nodes)),  # noqa: SLF001
    "dict": Reader._dict,  # noqa: SLF001
    "ordered": lambda reader, nodes: OrderedDict(reader._dict(nodes)),  # noqa: SLF001
    "named": Reader._named,  # noqa: SLF001
    "record": Reader._record,  # noqa: SLF001
    "numbers": Reader._numbers,  # noqa: SLF001
    "bytes": Reader._bytes,  # noqa: SLF001
    "bytearray": lambda reader, nodes: bytearray(reader._bytes(nodes)),  # noqa: SLF001
    "scalar": Reader._scalar,  # noqa: SLF001
    "array": Reader._array,  # noqa: SLF001
    "tensor": Reader._tensor,  # noqa: SLF001
    "absent": lambda _, nodes: Absent(*map(_text, _exactly(nodes, 2))),
}


def read_view(value: Any) -> View:
    """A view from its object in the record."""
    if not isinstance(value, dict):
        raise UnfitError(f"{_shown(value)} is no view of memory")
    try:
        return View(
            _whole(value["region"]),
            _text(value["dtype"]),
            _whole(value["offset"]),
            tuple(map(_whole, _list(value["shape"]))),
            tuple(map(_whole, _list(value["strides"]))),
        )
    except KeyError as error:
        raise UnfitError(f"a view of memory has no {error}") from None


def _joined(layout: Any, size: tuple[int, ...], parts: list[Any], *, is_coalesced: bool) -> Tensor:
    """The sparse tensor of these parts; torch checks that they fit together."""
    if not all(isinstance(t, Tensor) and t.layout is torch.strided for t in parts):
        raise UnfitError("a sparse tensor has parts that are no tensors")
    if layout == "sparse_coo" and len(parts) == 2:
        indices, values = parts
        made = torch.sparse_coo_tensor(indices, values, size, check_invariants=True)
        if is_coalesced and _is_sorted(indices):
            made = made._coalesced_(True)
        return made
    if layout in _COMPRESSED and len(parts) == 3:
        outer, inner, values = parts
        kind = _COMPRESSED[layout]
        return torch.sparse_compressed_tensor(
            outer, inner, values, size, layout=kind, check_invariants=True
        )
    raise UnfitError(f"{_shown(layout)} is no layout of a tensor that a capsule holds")


def _is_sorted(indices: Tensor) -> bool:
    """Whether the columns rise, each at the first place where it differs from the one before."""
    steps = indices[:, 1:] - indices[:, :-1]
    if not steps.numel():
        return bool(indices.shape[1] < 2)
    first = (steps != 0).int().argmax(dim=0, keepdim=True)
    return bool((steps.gather(0, first) > 0).all())


def _whole(value: Any) -> int:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise UnfitError(f"{_shown(value)} is no whole number of 64 bits")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise UnfitError(f"{_shown(value)} is no text")
    return value


def _plain(value: Any) -> str | int:
    return value if type(value) is str else _whole(value)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise UnfitError(f"{_shown(value)} is no list")
    return value


def _exactly(value: Any, count: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != count:
        raise UnfitError(f"{_shown(value)} is no list of {count}")
    return value


def _float(nodes: list[Node]) -> float:
    (text,) = _exactly(nodes, 1)
    if type(text) is not str or text not in _FLOATS:
        raise UnfitError(f"{_shown(text)} is no number")
    return _FLOATS[text]


def _dtype(nodes: list[Node]) -> torch.dtype:
    (text,) = _exactly(nodes, 1)
    if type(text) is not str or text not in _EVERY_DTYPE:
        raise UnfitError(f"{_shown(text)} is no dtype of torch")
    return _EVERY_DTYPE[text]


def _shown(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= _MOST_DIGITS else f"{text[:_MOST_DIGITS]}…"
