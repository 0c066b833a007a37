"""The closure of a step: how it is called, what it returned, and what it can see."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nanhunt.errors import UsageError

# A variable as a closure finds it: where it is looked up, under which key, and what it held.
_Seen: TypeAlias = tuple[Any, str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the closure: with the batch where it takes one.

    `seen` are the variables of its surroundings as they were, for a call that is repeated later,
    when a loop has moved on and `batch` means the next one.
    """

    closure: Callable[..., Any]
    batch: Any = None
    takes_batch: bool = False
    seen: tuple[_Seen, ...] = ()

    @classmethod
    def of(cls, closure: Any, batch: Any, *, later: bool = False) -> "Call":
        """The call that is meant; `later` notes the surroundings too.

        Raises:
            UsageError: it cannot be called with nothing, nor with the batch alone.
        """
        if not callable(closure):
            raise UsageError(
                f"step takes a function that computes the loss, as in "
                f"watch.step(lambda: loss_fn(model(x), y)); got {_kind(closure)}"
            )
        wanted = _arity(closure)
        if wanted > 1:
            raise UsageError(
                f"the closure takes no argument, or the batch as its only one; "
                f"this one takes {wanted}"
            )
        if wanted == 1 and batch is None:
            raise UsageError(
                "the closure takes the batch as its argument and none was given: "
                "watch.step(closure, batch=batch)"
            )
        return cls(closure, batch, wanted == 1, tuple(_surroundings(closure)) if later else ())

    def __call__(self) -> Any:
        """What the closure returns."""
        return self.closure(self.batch) if self.takes_batch else self.closure()

    def variables(self) -> dict[str, Any]:
        """What the closure can see by name: its cells, globals, and what it is bound to."""
        found = {name: value for _, name, value in _surroundings(self.closure)}
        owner = getattr(self.closure, "__self__", None)
        if owner is not None:
            found |= getattr(owner, "__dict__", {})
        return found

    def modules(self) -> list[nn.Module]:
        """The modules among these."""
        return [value for value in self.variables().values() if isinstance(value, nn.Module)]

    @contextlib.contextmanager
    def surrounded(self) -> Iterator[None]:
        """Give the variables the values back that they had when the call was made."""
        now = [_get(place, name) for place, name, _ in self.seen]
        try:
            for place, name, value in self.seen:
                _set(place, name, value)
            yield
        finally:
            for (place, name, _), value in zip(self.seen, now, strict=True):
                _set(place, name, value)


_GONE = object()


def _get(place: Any, name: str) -> Any:
    if isinstance(place, dict):
        return place.get(name, _GONE)
    try:
        return place.cell_contents
    except ValueError:  # an empty cell
        return _GONE


def _set(place: Any, name: str, value: Any) -> None:
    if isinstance(place, CellType):
        if value is _GONE:
            del place.cell_contents
        else:
            place.cell_contents = value
    elif value is _GONE:
        place.pop(name, None)
    else:
        place[name] = value


def _surroundings(closure: Any) -> Iterator[_Seen]:
    """The variables of a function that are not its own: those of the functions around, globals."""
    function = getattr(closure, "__func__", closure)
    if not isinstance(function, FunctionType):
        return
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        value = _get(cell, name)
        if value is not _GONE:
            yield cell, name, value
    table = function.__globals__
    yield from ((table, name, table[name]) for name in code.co_names if name in table)


def _arity(closure: Any) -> int:
    """How many arguments must be given."""
    function = getattr(closure, "__func__", closure)
    if isinstance(function, FunctionType):
        bound = function is not closure
        return function.__code__.co_argcount - len(function.__defaults__ or ()) - bound
    try:
        parameters = inspect.signature(closure).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return 0
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def loss_of(value: Any) -> Tensor:
    """The loss in what a closure returned: the tensor, the entry `"loss"`, or the sum of all.

    Raises:
        UsageError: it is none that a backward can start from.
    """
    loss = value
    if isinstance(value, Mapping):
        loss = value["loss"] if "loss" in value else _sum_of(value)
    if not isinstance(loss, Tensor):
        raise UsageError(
            f"the closure is to return the loss, a scalar tensor or a mapping of named terms; "
            f"got {_kind(loss)}"
        )
    if loss.numel() != 1:
        raise UsageError(
            f"the loss is to be a scalar; got shape {list(loss.shape)}: reduce it, as by .mean()"
        )
    if not loss.requires_grad:
        raise UsageError(
            "the loss has no graph: nothing in it depends on a parameter that requires a gradient "
            "(a detach, a no_grad block, or a value taken with .item()?)"
        )
    return loss


def _sum_of(terms: Mapping[Any, Any]) -> Tensor:
    odd = [name for name, t in terms.items() if not isinstance(t, Tensor) or t.numel() != 1]
    if odd or not terms:
        raise UsageError(
            f"the terms of a loss are scalar tensors; {odd[0]!r} is none: return them alone, or "
            f"their sum under the key 'loss'"
            if odd
            else "the closure returned an empty mapping: there is no loss in it"
        )
    return torch.stack([term.reshape(()) for term in terms.values()]).sum()


def shared_out(value: Any, by: int) -> Any:
    """What the closure returned, as the part of a step of `by` micro-batches."""
    if not isinstance(value, Mapping):
        return value / by if by > 1 else value
    terms = {k: v for k, v in value.items() if isinstance(v, Tensor) and v.numel() == 1}
    kept = terms if "loss" in value else value
    return {name: term / by for name, term in kept.items()} if by > 1 else dict(kept)


def _kind(value: Any) -> str:
    return "None" if value is None else f"an object of type {type(value).__name__}"
