"""How a call is written down: the literals of its arguments, and the shortest name of the op."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nanhunt.interventions import OwnMode
from nanhunt.repro.scene import Scene
from nanhunt.snapshot import keep_generators


def literal(value: Any, names: Mapping[int, str]) -> str:
    """An argument as Python source; `names` are the tensors of `t` by identity."""
    if isinstance(value, Tensor):
        return f't["{names[id(value)]}"]'
    if isinstance(value, (list, tuple)):
        return _listed(value, names)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, complex):
        return f"complex({literal(value.real, names)}, {literal(value.imag, names)})"
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    # Of a generator the state is set before the call; the others are numbers, texts, None, and
    # torch's own names for dtypes, layouts and memory formats.
    return "None" if isinstance(value, torch.Generator) else repr(value)


def _listed(values: Sequence[Any], names: Mapping[int, str]) -> str:
    """A list; a long one of tensors that are numbered in a row is written as such."""
    told = [literal(value, names) for value in values]
    stem = names[id(values[0])].partition(".")[0] if values and id(values[0]) in names else ""
    if len(told) > 3 and told == [f't["{stem}.{i}"]' for i in range(len(told))]:
        return f'[t[f"{stem}.{{i}}"] for i in range({len(told)})]'
    return f"[{', '.join(told)}]"


def call_of(scene: Scene) -> str:
    """The call of a scene's op as an expression."""
    names = {id(tensor): name for name, tensor in scene.named.items()}
    written = {name for name, _ in scene.written()} if scene.incoming else set()
    name, count = _shortest(scene)
    told = [_argument(value, names, written) for value in scene.args[:count]]
    told += [f"{key}={_argument(value, names, written)}" for key, value in scene.kwargs.items()]
    if name.startswith("."):
        return f"{told[0]}{name}({', '.join(told[1:])})"
    return f"{name}({', '.join(told)})"


def _argument(value: Any, names: Mapping[int, str], written: set[str]) -> str:
    """An argument; one that the op writes to is a copy where a gradient is asked for."""
    told = literal(value, names)
    if isinstance(value, Tensor) and names[id(value)] in written:
        return f"{told}.clone()"
    if isinstance(value, (list, tuple)) and any(names.get(id(v)) in written for v in value):
        return f"[v.clone() for v in {told}]"
    return told


def _shortest(scene: Scene) -> tuple[str, int]:
    """A public function that runs this very op with these very arguments, and how many it takes.

    Where none does it is the op itself, `torch.ops.aten.NAME.OVERLOAD`.
    """
    namespace, _, base = scene.func._schema.name.partition("::")  # noqa: SLF001 - its public name
    overload = scene.func._schema.overload_name or "default"  # noqa: SLF001 - as above
    for told, function in _candidates(base) if namespace == "aten" else ():
        # What the op takes by default need not be said, and may be called otherwise there.
        for count in range(len(scene.args), 0, -1):
            if _runs_the_same(scene, function, count):
                return told, count
    return f"torch.ops.{namespace}.{base}.{overload}", len(scene.args)


_PLACES = {
    "torch": torch,
    "torch.linalg": torch.linalg,
    "torch.special": torch.special,
    "torch.nn.functional": torch.nn.functional,
}


def _candidates(base: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public functions that are called like an op."""
    plain = base.lstrip("_")
    method = getattr(Tensor, plain, None)
    if plain.endswith("_") and callable(method):
        yield f".{plain}", method
    for place, module in _PLACES.items():
        name = plain.removeprefix(f"{place.rpartition('.')[2]}_")
        function = getattr(module, name, None)
        if callable(function):
            yield f"{place}.{name}", function


class _Watch(OwnMode):
    """Writes down the ops that run, what they are given and what they return."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ran: list[tuple[Any, dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        returned = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.detach.default:  # autograd's own, for what a node keeps
            self.ran.append((func, _by_name(func, args, kwargs or {}), returned))
        return returned


def _by_name(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument of a call by its name, what it takes by default included."""
    arguments = func._schema.arguments  # noqa: SLF001 - its public name
    given = {a.name: a.default_value for a in arguments if a.has_default_value()}
    given |= {a.name: value for a, value in zip(arguments, args, strict=False)}
    return {**given, **kwargs}


def _runs_the_same(scene: Scene, function: Callable[..., Any], count: int) -> bool:
    """Whether a function runs the op of a scene and nothing else, and returns what that returns."""
    args, kwargs = scene.arguments()
    restore = keep_generators()
    watch = _Watch()
    try:
        with watch, torch.set_grad_enabled(bool(scene.incoming)):
            returned = function(*args[:count], **kwargs)
    except Exception:  # noqa: BLE001 - it takes other arguments: not the same call
        return False
    finally:
        restore()
    if len(watch.ran) != 1:
        return False
    func, given, made = watch.ran[0]
    wanted = _by_name(scene.func, args, kwargs)
    is_alike = all(_is_one(given.get(name), value) for name, value in wanted.items())
    return func is scene.func and is_alike and _is_one(returned, made)


def _is_one(value: Any, other: Any) -> bool:
    """Whether two arguments are the same: tensors in person, all else by how it is written."""
    if isinstance(value, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(value) == len(other) and all(map(_is_one, value, other))
    if isinstance(value, Tensor) or isinstance(other, Tensor):
        return value is other
    return repr(value) == repr(other)
