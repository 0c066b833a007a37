"""Spelling a batch in JSON: what it is made of, with its tensors and arrays named by number.

A text, a truth value, null, a whole number of 64 bits and a finite number stand for themselves.
Everything else is a list whose first entry says what it is, as `["tuple", 1, ["tensor", 0]]`.
What has no spelling is named in `lost`.
"""

import dataclasses
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nanhunt.capsule.contents import Absent
from nanhunt.capsule.lookalikes import qualified
from nanhunt.capsule.memory import DTYPES, MOST_ELEMENTS, Memory
from nanhunt.structure import is_named_tuple

# Deeper than any batch, and far from the depth at which Python gives up.
DEPTH = 64
# From here on a list of numbers is stored as memory.
_MANY = 16
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_KEYS = (str, int, bool)

# What a batch may take of a header, which has room for a million values in all, and what one
# tensor or array takes of it. A batch of more objects than that loses its largest part.
ROOM = 300_000
_TENSOR = 25
_FEW = 100

Node = Any


class _FullError(Exception):
    """There are more values than a header holds."""


class Speller:
    """Spells values, and collects the tensors and arrays that they name and what was lost."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.views: list[dict[str, Any]] = []  # in the order of the memory
        self.tensors: list[Node] = []
        self.lost: list[str] = []
        self.room: float = math.inf
        self._known: dict[int, tuple[Any, Node]] = {}  # holds each value, so that ids stay its own

    def spell(  # noqa: PLR0911 - one for each kind of value
        self, value: Any, place: str, depth: int = 0
    ) -> Node:
        """The spelling of a value; `place` is the expression that reaches it."""
        self._take(1)
        if depth > DEPTH:
            return self._lose(place, f"nested more than {DEPTH} deep")
        if value is None or type(value) in (bool, str):
            return value
        if type(value) is int:
            is_long = not -(2**63) <= value < 2**63
            return self._lose(place, "a whole number beyond 64 bits") if is_long else value
        if type(value) is float:
            return value if math.isfinite(value) else ["float", str(value)]
        if isinstance(value, Tensor):
            return self._once(value, place, self._tensor)
        if isinstance(value, np.ndarray):
            return self._once(value, place, self._array)
        plain = _PLAIN.get(type(value))
        if plain is not None:
            return plain(value)
        return self._container(value, place, depth + 1)

    def _take(self, values: int) -> None:
        self.room -= values
        if self.room < 0:
            raise _FullError

    def part(self, value: Any, place: str, depth: int = 0) -> Node:
        """The spelling of a value that may be too much, and is lost as a whole then."""
        before = len(self.memory), len(self.views), len(self.tensors), len(self.lost)
        known, room = dict(self._known), self.room
        try:
            return self.spell(value, place, depth)
        except _FullError:
            self.memory.forget(before[0])
            noted: tuple[list[Any], ...] = (self.views, self.tensors, self.lost)
            for entries, count in zip(noted, before[1:], strict=True):
                del entries[count:]
            self._known, self.room = known, room
            return self._lose(place, "more values than a capsule holds")

    def _inner(self, value: Any, place: str, depth: int, count: int) -> Node:
        """One of so many values; near the top each of a few may be lost alone."""
        is_near = depth <= 2 and count <= _FEW
        return self.part(value, place, depth) if is_near else self.spell(value, place, depth)

    # -- what holds others -------------------------------------------------------------------

    def _container(  # noqa: PLR0911 - as above
        self, value: Any, place: str, depth: int
    ) -> Node:
        if is_named_tuple(value):
            items = zip(value._fields, value, strict=True)
            return ["named", qualified(value), *self._fields(items, place, depth)]
        if isinstance(value, (tuple, list)):
            return self._sequence(value, place, depth)
        if isinstance(value, Mapping):
            return self._mapping(value, place, depth)
        if isinstance(value, Absent):
            return self._lose(place, value.kind)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [f.name for f in dataclasses.fields(value)]
            self._note_strangers(value, names, place)
            known = [(name, getattr(value, name)) for name in names if hasattr(value, name)]
            return ["record", qualified(value), *self._fields(known, place, depth)]
        if isinstance(value, np.generic) and value.dtype.kind in "biufcmMSU":
            return ["scalar", value.dtype.str, value.tobytes().hex()]
        if isinstance(value, (bytes, bytearray)):
            return [
                type(value).__name__,
                self._packed(np.frombuffer(bytes(value), np.uint8), place),
            ]
        return self._lose(place, _kind(value))

    def _fields(self, items: Any, place: str, depth: int) -> list[Node]:
        known = list(items)
        count = len(known)
        pairs = [(name, self._inner(item, f"{place}.{name}", depth, count)) for name, item in known]
        return [[name for name, _ in pairs], [node for _, node in pairs]]

    def _sequence(self, value: Any, place: str, depth: int) -> Node:
        word = "list" if isinstance(value, list) else "tuple"
        if type(value) is torch.Size:
            return ["size", *value]
        if type(value) not in (list, tuple):
            self.lost.append(f"{place} (the class {_kind(value)}; kept as a {word})")
        if len(value) >= _MANY:
            kinds = set(map(type, value))
            if kinds == {float}:
                return ["numbers", word, self._packed(np.array(value, np.float64), place)]
            if kinds == {int} and all(-(2**63) <= item < 2**63 for item in value):
                return ["numbers", word, self._packed(np.array(value, np.int64), place)]
        count = len(value)
        return [word, *(self._inner(v, f"{place}[{i}]", depth, count) for i, v in enumerate(value))]

    def _mapping(self, value: Mapping[Any, Any], place: str, depth: int) -> Node:
        word = "ordered" if type(value) is OrderedDict else "dict"
        if type(value) not in (dict, OrderedDict):
            self.lost.append(f"{place} (the class {_kind(value)}; kept as a dict)")
        pairs = []
        for key, item in value.items():
            if type(key) not in _KEYS or (type(key) is int and not -(2**63) <= key < 2**63):
                self._lose(f"{place}[{_shown(key)}]", f"under a key that is {_kind(key)}")
            else:
                node = self._inner(item, f"{place}[{key!r}]", depth, len(value))
                pairs.append([key, node])
        return [word, *pairs]

    def _note_strangers(self, value: Any, names: list[str], place: str) -> None:
        """Name the attributes of a data class that are no fields, less those it can compute."""
        for name in getattr(value, "__dict__", ()):
            is_cached = isinstance(getattr(type(value), name, None), functools.cached_property)
            if name not in names and not is_cached:
                self._lose(f"{place}.{name}", "an attribute that is no field")

    # -- what has memory ---------------------------------------------------------------------

    def _once(self, value: Any, place: str, spell: Callable[[Any, str], Node]) -> Node:
        """A tensor that stands at several places is one object at all of them."""
        if id(value) not in self._known:
            self._take(_TENSOR)
            self._known[id(value)] = (value, spell(value, place))
        return self._known[id(value)][1]

    def _packed(self, values: np.ndarray[Any, Any], place: str) -> Node:
        self._take(_TENSOR)
        self._known[id(values)] = (values, None)  # its memory is read when the file is written
        return self._array(values, place)

    def _tensor(self, tensor: Tensor, place: str) -> Node:
        kind = type(tensor)
        if kind not in (Tensor, nn.Parameter):
            if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
                return self._lose(place, _kind(tensor))
            self.lost.append(f"{place} (the class {_kind(tensor)}; kept as a tensor)")
        try:
            return self._measured(tensor, place)
        except Exception as error:  # noqa: BLE001 - there are many kinds of tensors without memory
            words = " ".join(str(error).split())[:80]
            return self._lose(place, f"a tensor that cannot be looked into: {words}")

    def _measured(self, tensor: Tensor, place: str) -> Node:
        if tensor.layout is not torch.strided:
            return self._sparse(tensor, place)
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor.is_quantized or dtype not in DTYPES:
            return self._lose(place, f"a tensor of dtype {dtype}")
        if tensor.device.type == "meta":
            return self._lose(place, "a tensor on the meta device, which holds no numbers")
        if tensor.numel() > MOST_ELEMENTS:
            return self._lose(place, f"a tensor of {tensor.numel()} elements")
        flags = {
            "grad": tensor.requires_grad,
            "conj": tensor.is_conj(),
            "neg": tensor.is_neg(),
            "parameter": isinstance(tensor, nn.Parameter),
        }
        self.memory.add_tensor(tensor.detach(), place)
        node = ["view", len(self.views), *(name for name, is_set in flags.items() if is_set)]
        self.views.append({})
        return self._numbered(node)

    def _sparse(self, tensor: Tensor, place: str) -> Node:
        held = tensor.detach()
        if tensor.layout is torch.sparse_coo:
            parts = {"indices": held._indices(), "values": held._values()}  # noqa: SLF001 - as they are
            flags = ["coalesced"] if tensor.is_coalesced() else []
        elif tensor.layout in _COMPRESSED:
            is_row = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
            outer, inner = ("crow", "col") if is_row else ("ccol", "row")
            names = (f"{outer}_indices", f"{inner}_indices", "values")
            parts = {name: getattr(held, name)() for name in names}
            flags = []
        else:
            return self._lose(place, f"a tensor of layout {tensor.layout}")
        nodes = [self._tensor(part, f"{place}.{name}") for name, part in parts.items()]
        for part in parts.values():
            self._known[id(part)] = (part, None)
        flags += ["grad"] if tensor.requires_grad else []
        layout = str(tensor.layout).removeprefix("torch.")
        return self._numbered([layout, list(tensor.shape), nodes, *flags])

    def _numbered(self, node: Node) -> Node:
        self.tensors.append(node)
        return ["tensor", len(self.tensors) - 1]

    def _array(self, array: np.ndarray[Any, Any], place: str) -> Node:
        if type(array) is not np.ndarray:
            return self._lose(place, _kind(array))
        if array.dtype.kind not in "biufcmMSU" or array.size > MOST_ELEMENTS:
            return self._lose(place, f"an array of dtype {array.dtype} and {array.size} elements")
        self.memory.add_array(array, place)
        self.views.append({})
        return ["array", len(self.views) - 1, *(["fixed"] if not array.flags.writeable else [])]

    def _lose(self, place: str, kind: str) -> Node:
        self.lost.append(f"{place} ({kind})")
        return ["absent", place, kind]


_PLAIN: dict[type, Callable[[Any], Node]] = {
    complex: lambda value: ["complex", repr(value.real), repr(value.imag)],
    torch.dtype: lambda value: ["dtype", str(value).removeprefix("torch.")],
    torch.device: lambda value: ["device", str(value)],
}


def _kind(value: Any) -> str:
    kind = type(value)
    return (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )


def _shown(value: Any) -> str:
    """A key in few characters, without calling what its class has for it."""
    return repr(value)[:40] if type(value) in (str, int, float, tuple, bytes) else _kind(value)
