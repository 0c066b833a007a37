"""One call of an op with its real operands, and the gradients that came back: what can be run."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nanhunt import measurement
from nanhunt.recorder import CapturedCall
from nanhunt.recorder.captured import copied, is_mutating, tensors_of
from nanhunt.recorder.schema import Call, op_info
from nanhunt.snapshot import keep_generators


@dataclass(frozen=True, slots=True)
class Look:
    """Where the failure shows: in which result, as what, and at which element if not anywhere.

    `position` counts the results of a `Scene`. An element is named where the operands are not
    finite themselves, so that what they pass on is not taken for what the op made.
    """

    position: int
    kind: Literal["nan", "nonfinite"] = "nonfinite"
    at: tuple[int, ...] | None = None

    def mask(self, result: Tensor) -> Tensor:
        """Where a result is what is looked for."""
        values = measurement.dense(result.detach())
        mask = measurement.nonfinite_mask(values)
        if self.kind == "nan":
            mask = mask & values.isnan()
        return mask if self.at is None else mask[self.at]


class Result(NamedTuple):
    """One result: how the script reaches it, how it is called, and its values."""

    expression: str
    name: str
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class Scene:
    """An op, its operands, and for its backward the gradients of its outputs.

    Operands that require a gradient do so here too where there is an `incoming` gradient, and none
    does otherwise.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    incoming: tuple[Tensor | None, ...] = ()
    generator: Tensor | None = None

    @classmethod
    def of(cls, call: CapturedCall, incoming: tuple[Tensor | None, ...] = ()) -> "Scene":
        """The scene of a captured call: of its backward with gradients, else of itself."""
        args, kwargs = copied((call.args, call.kwargs))
        if not incoming:
            for tensor in tensors_of(args, kwargs):
                tensor.requires_grad_(False)
        return cls(call.func, args, kwargs, incoming, call.generator)

    @property
    def named(self) -> dict[str, Tensor]:
        """Every tensor by its name, each once: operands by their argument, then the gradients."""
        named: dict[str, Tensor] = {}
        known: set[int] = set()
        for name, tensor in (*self._operands(), *self._gradients()):
            if id(tensor) not in known:
                known.add(id(tensor))
                named[name] = tensor
        return named

    def _operands(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in Call(op_info(self.func), self.args, self.kwargs).named:
            items = enumerate(value) if isinstance(value, (list, tuple)) else ()
            if isinstance(value, Tensor):
                yield name, value
            yield from ((f"{name}.{i}", t) for i, t in items if isinstance(t, Tensor))

    def _gradients(self) -> Iterator[tuple[str, Tensor]]:
        many = len([g for g in self.incoming if g is not None]) > 1
        for i, gradient in enumerate(self.incoming):
            if gradient is not None:
                yield (f"gradient.{i}" if many else "gradient"), gradient

    @property
    def trained(self) -> dict[str, Tensor]:
        """The operands whose gradient is asked for."""
        return {n: t for n, t in self.named.items() if t.requires_grad} if self.incoming else {}

    @property
    def is_dense(self) -> bool:
        """Whether every tensor of it is strided."""
        return all(tensor.layout is torch.strided for tensor in self.named.values())

    @property
    def home(self) -> torch.device:
        """The device of the first of its tensors that is not on the CPU; else the CPU."""
        devices = (tensor.device for tensor in self.named.values())
        return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Scene":
        """The same scene with every tensor changed, each once."""
        known = {id(tensor): change(tensor) for tensor in self.named.values()}
        args, kwargs, incoming = pytree.tree_map_only(
            Tensor, lambda t: known[id(t)], (self.args, dict(self.kwargs), self.incoming)
        )
        return replace(self, args=args, kwargs=kwargs, incoming=incoming)

    # -- running it ------------------------------------------------------------------------------

    def results(self, call: Callable[..., Any] | None = None) -> list[Result]:
        """Run it, on copies of what the op writes to; the generators stand as before."""
        with _drawing_from(self.generator, self.home), torch.set_grad_enabled(bool(self.incoming)):
            args, kwargs = self.arguments()
            returned = (call or self.func)(*args, **kwargs)
            if self.incoming:
                return self._differentiated(returned)
            return list(self._shown(returned, args, kwargs))

    def arguments(self) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The arguments of one call, which it may overwrite."""
        if not is_mutating(self.func):
            return self.args, self.kwargs
        if not self.incoming:
            args, kwargs = copied((self.args, dict(self.kwargs)))
            return args, kwargs
        # What requires a gradient may be written to only where it is no leaf.
        written = {id(t) for _, t in self.written()}
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda t: t.clone() if id(t) in written else t, (self.args, dict(self.kwargs))
        )
        return args, kwargs

    def written(self) -> Iterator[tuple[str, Tensor]]:
        """The operands that the op writes to, by name."""
        names = {name for _, name in op_info(self.func).mutated}
        yield from ((n, t) for n, t in self._operands() if n.partition(".")[0] in names)

    def _shown(self, returned: Any, args: Any, kwargs: Any) -> Iterator[Result]:
        """Everything that the op returned, then the operands that it wrote to."""
        known: set[int] = set()
        for expression, name, tensor in _returned(returned):
            known.add(id(tensor))
            yield Result(expression, name, tensor)
        for name, tensor in replace(self, args=args, kwargs=kwargs).written():
            if id(tensor) not in known:
                yield Result(f't["{name}"]', name, tensor)

    def _differentiated(self, returned: Any) -> list[Result]:
        pairs = [(o, self.incoming[o.output_nr]) for _, _, o in self.answered(returned)]
        trained = self.trained
        gradients = torch.autograd.grad(
            [o for o, _ in pairs], list(trained.values()), [g for _, g in pairs], allow_unused=True
        )
        return [
            Result(
                f"grads[{i}]",
                f"gradient of {name}",
                gradient if gradient is not None else torch.empty(0),
            )
            for i, (name, gradient) in enumerate(zip(trained, gradients, strict=True))
        ]

    def answered(self, returned: Any) -> list[tuple[str, str, Tensor]]:
        """The outputs that hang on the op's node and to which a gradient came."""
        return [
            (expression, name, tensor)
            for expression, name, tensor in _returned(returned)
            if tensor.grad_fn is not None
            and tensor.output_nr < len(self.incoming)
            and self.incoming[tensor.output_nr] is not None
        ]


def _returned(returned: Any) -> Iterator[tuple[str, str, Tensor]]:
    """The tensors that an op returned: expression, name, tensor."""
    if isinstance(returned, Tensor):
        yield "y", "the result", returned
        return
    for i, value in enumerate(returned if isinstance(returned, (list, tuple)) else ()):
        if isinstance(value, Tensor):
            yield f"y[{i}]", f"result {i}", value
        elif isinstance(value, (list, tuple)):
            inner = ((j, t) for j, t in enumerate(value) if isinstance(t, Tensor))
            yield from ((f"y[{i}][{j}]", f"result {i}, {j}", t) for j, t in inner)


@contextlib.contextmanager
def _drawing_from(generator: Tensor | None, device: torch.device) -> Iterator[None]:
    """Let random ops draw from a state of the generator, and put it back."""
    if generator is None:
        yield
        return
    restore = keep_generators()
    try:
        if device.type == "cuda":
            torch.cuda.set_rng_state(generator, device)
        else:
            torch.set_rng_state(generator)
        yield
    finally:
        restore()
