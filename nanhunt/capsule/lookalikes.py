"""Types that look like those of a batch, made without importing anything a file names.

A named tuple or a data class is stored by its qualified name and its fields. Reading makes a type
of the same fields: attributes and positions are there, methods are not. `adopted` gives the values
back to their own type, where the program has imported it by itself.
"""

import dataclasses
import keyword
import sys
from collections import OrderedDict
from collections.abc import Iterable
from functools import lru_cache
from operator import itemgetter
from typing import Any

from nanhunt.capsule.contents import UnfitError
from nanhunt.structure import is_named_tuple

_MOST_FIELDS = 1000
_KEPT_AS = "__kept_as__"


def qualified(value: Any) -> str:
    """Module and name of the type of a value; of a look-alike those that it stands for."""
    kind = type(value)
    kept: str | None = vars(kind).get(_KEPT_AS)
    return kept or f"{kind.__module__}:{kind.__qualname__}"


def make_tuple(name: str, fields: tuple[str, ...], values: Iterable[Any]) -> Any:
    """A named tuple of these fields."""
    return tuple.__new__(_tuple_type(name, _checked(name, fields)), values)


def make_record(name: str, fields: tuple[str, ...], values: Iterable[Any]) -> Any:
    """An object with these attributes, a data class to those who ask."""
    kind = _record_type(name, _checked(name, fields))
    return kind(**dict(zip(fields, values, strict=True)))


def _checked(name: str, fields: tuple[str, ...]) -> tuple[str, ...]:
    for field in fields:
        is_dunder = field.startswith("__")
        if not field.isidentifier() or keyword.iskeyword(field) or is_dunder or len(field) > 200:
            raise UnfitError(
                f"{name[:60]!r} has a field {field[:40]!r}, which is no name of a field"
            )
    if len(set(fields)) != len(fields) or len(fields) > _MOST_FIELDS:
        raise UnfitError(f"{name[:60]!r} has {len(fields)} fields, some of them twice or too many")
    return fields


@lru_cache(maxsize=256)
def _tuple_type(name: str, fields: tuple[str, ...]) -> Any:
    def new(cls: Any, *values: Any) -> Any:
        return tuple.__new__(cls, values)

    def show(self: Any) -> str:
        pairs = zip(fields, self, strict=True)
        return f"{_short(name)}({', '.join(f'{key}={value!r}' for key, value in pairs)})"

    def make(cls: Any, values: Iterable[Any]) -> Any:
        return tuple.__new__(cls, values)

    def as_dict(self: Any) -> dict[str, Any]:
        return dict(zip(fields, self, strict=True))

    def replaced(self: Any, **changes: Any) -> Any:
        return tuple.__new__(type(self), (as_dict(self) | changes).values())

    body: dict[str, Any] = {
        "__slots__": (),
        "__doc__": f"Looks like {name}, which was not imported.",
        "__new__": new,
        "__repr__": show,
        _KEPT_AS: name,
        "_fields": fields,
        "_make": classmethod(make),
        "_asdict": as_dict,
        "_replace": replaced,
    }
    accessors = {key: property(itemgetter(place)) for place, key in enumerate(fields)}
    return type(_short(name), (tuple,), {**body, **accessors})


@lru_cache(maxsize=256)
def _record_type(name: str, fields: tuple[str, ...]) -> Any:
    def init(self: Any, **values: Any) -> None:
        self.__dict__.update(values)

    def show(self: Any) -> str:
        pairs = vars(self).items()
        return f"{_short(name)}({', '.join(f'{key}={value!r}' for key, value in pairs)})"

    body: dict[str, Any] = {
        "__annotations__": dict.fromkeys(fields, Any),
        "__doc__": f"Looks like {name}, which was not imported.",
        "__init__": init,
        "__repr__": show,
        _KEPT_AS: name,
    }
    # Without methods of its own making, `dataclass` only lists the fields: no code is put together.
    return dataclasses.dataclass(init=False, repr=False, eq=False)(type(_short(name), (), body))


def _short(name: str) -> str:
    last = name.rpartition(":")[2].rpartition(".")[2]
    return last if last.isidentifier() and len(last) <= 200 else "Record"


def adopted(value: Any, homes: Iterable[str] = ()) -> Any:
    """The same value with look-alikes turned into their own types, where those are known.

    Nothing is imported: a type counts when its module has been imported already and it has the
    very same fields. Its constructor is not called, since its fields are known.

    Args:
        value: a batch.
        homes: names of modules in which a type of `__main__` may be found.
    """
    modules = tuple(homes)
    if type(value) in (list, tuple):
        return type(value)(adopted(item, modules) for item in value)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, adopted(item, modules)) for key, item in value.items())
    if vars(type(value)).get(_KEPT_AS) is None:
        return value
    if is_named_tuple(value):
        items = [adopted(item, modules) for item in value]
        kind = _own_type(value, modules) or type(value)
        return tuple.__new__(kind, items)
    names = [field.name for field in dataclasses.fields(value)]
    kind = _own_type(value, modules) or type(value)
    made = object.__new__(kind)
    for name in names:
        object.__setattr__(made, name, adopted(getattr(value, name), modules))
    return made


def _own_type(value: Any, homes: tuple[str, ...]) -> Any:
    """The type that a look-alike stands for, if the program knows it and it fits."""
    module, _, path = qualified(value).partition(":")
    for home in homes if module == "__main__" else (module,):
        found: Any = sys.modules.get(home)
        for name in path.split("."):
            # Not `getattr`: a module may answer that by importing something.
            found = vars(found).get(name) if hasattr(found, "__dict__") else None
        if isinstance(found, type) and _fits(found, value):
            return found
    return None


def _fits(kind: Any, value: Any) -> bool:
    if is_named_tuple(value):
        return issubclass(kind, tuple) and getattr(kind, "_fields", None) == value._fields
    if not dataclasses.is_dataclass(kind) or kind.__new__ is not object.__new__:
        return False
    names = [field.name for field in dataclasses.fields(kind)]
    return names == [field.name for field in dataclasses.fields(value)]
