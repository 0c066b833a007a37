"""Modes that change how a step executes: other precisions, and FP16 made bearable on a CPU.

They work below autograd, at the level of aten ops, so that casts in the user's code, in torch's
own composites and in autocast are all met in one place. They never record.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_REALS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COMPLEX_OF = {torch.float32: torch.complex64, torch.float64: torch.complex128}

# Draws differ with the dtype; these draw in FP32 as the plain step does, and cast what was drawn.
_DRAWN = frozenset(["rand", "randn", "rand_like", "randn_like", "normal", "bernoulli"])
_DRAWN_IN_PLACE = frozenset(
    ["normal_", "uniform_", "exponential_", "log_normal_", "cauchy_", "bernoulli_"]
)
_DRAWING = torch.float32


def dtype_under(dtype: torch.dtype, real: torch.dtype) -> torch.dtype:
    """The dtype that stands for `dtype` when every real number is to be of dtype `real`."""
    if dtype in _REALS:
        return real
    if dtype.is_complex:
        return _COMPLEX_OF[real]
    return dtype


class OwnMode(TorchDispatchMode):
    """A mode of ours, only ever entered while compiled code is told to run eagerly.

    Unlike those that the program enters itself, it goes on in the threads that are started under
    it: see `recorder.threads`.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True would wrap the dispatch in the compiler's guard, whose import takes seconds.
        return False

    def for_thread(self) -> "OwnMode":
        """What does this one's work in a thread that the running one is about to start."""
        return self

    def finish(self) -> None:
        """Called in such a thread when it is over."""


class OwnCalls(TorchFunctionMode):
    """A mode of ours above autograd, which goes on in threads as one below it does."""


class PrecisionRewriting(OwnMode):
    """Runs everything in one precision, also against casts in user code and in autocast.

    Every `dtype=` that an op is given is rewritten, and operands that come from outside in another
    floating dtype are cast on the way in. `model.double()` alone would be undone by any `.float()`.
    """

    def __init__(self, real: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.real = real

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")  # noqa: SLF001 - its public name
        if name in _DRAWN or name in _DRAWN_IN_PLACE:
            return self._draw(func, args, kwargs, in_place=name in _DRAWN_IN_PLACE)
        if name.startswith("_amp_"):
            return _scaled(func, args, kwargs)
        if isinstance(kwargs.get("dtype"), torch.dtype):
            kwargs["dtype"] = dtype_under(kwargs["dtype"], self.real)
        if name in ("_softmax", "_log_softmax"):
            args = (*args[:2], False)  # half_to_float: nothing is half any more
        args, kwargs = self._cast_operands(func, args, kwargs)
        if name == "lift_fresh":  # a literal: nobody else holds its memory
            return self._cast(func(*args, **kwargs))
        return func(*args, **kwargs)

    def _cast_operands(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Cast what an op only reads; a copy of what it looks at or writes to will not do."""
        if all(map(self._fits, args)) and all(map(self._fits, kwargs.values())):
            return args, kwargs  # the common case: everything is in the precision already
        arguments = func._schema.arguments  # noqa: SLF001 - its public name
        values = {**{a.name: v for a, v in zip(arguments, args, strict=False)}, **kwargs}
        aliased = {a.name for a in arguments if a.alias_info is not None}
        written = pytree.tree_leaves([values.get(name) for name in aliased])
        if any(isinstance(t, Tensor) and self._cast(t) is not t for t in written):
            return args, kwargs  # memory from outside keeps its dtype, and so must its operands
        cast = {
            name: value if name in aliased else pytree.tree_map_only(Tensor, self._cast, value)
            for name, value in values.items()
        }
        names = [a.name for a in arguments[: len(args)]]
        return tuple(cast[name] for name in names), {name: cast[name] for name in kwargs}

    def _fits(self, value: Any) -> bool:
        if isinstance(value, Tensor):
            return dtype_under(value.dtype, self.real) == value.dtype
        return not isinstance(value, list | tuple) or all(map(self._fits, value))

    def _cast(self, tensor: Tensor) -> Tensor:
        wanted = dtype_under(tensor.dtype, self.real)
        return tensor if wanted == tensor.dtype else tensor.to(wanted)

    def _draw(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, in_place: bool
    ) -> Tensor:
        read = args[1:] if in_place else args
        read = pytree.tree_map_only(Tensor, lambda t: t.to(dtype_under(t.dtype, _DRAWING)), read)
        if in_place:
            target: Tensor = args[0]
            scratch = torch.empty_like(target, dtype=dtype_under(target.dtype, _DRAWING))
            return target.copy_(func(scratch, *read, **kwargs))
        if any(a.name == "dtype" for a in func._schema.arguments):  # noqa: SLF001 - as above
            # A double that was asked for is drawn as one; what is double by default is not.
            like = next((t.dtype for t in read if isinstance(t, Tensor)), _DRAWING)
            asked = kwargs.get("dtype")
            is_double = asked in (torch.float64, torch.complex128)
            kwargs["dtype"] = asked if is_double else dtype_under(asked or like, _DRAWING)
        return self._cast(func(*read, **kwargs))


def _scaled(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an op of GradScaler, which takes its own numbers in FP32 only."""
    narrow = tuple(
        a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
    )
    returned = func(*narrow, **kwargs)
    for arg, used in zip(args, narrow, strict=True):
        if isinstance(arg, Tensor) and used is not arg:
            arg.copy_(used)
    return returned


# Op -> positions of its outputs that stay in FP32.
_EMULATED: Mapping[str, tuple[int, ...]] = {
    "aten::mm": (),
    "aten::addmm": (),
    "aten::bmm": (),
    "aten::baddbmm": (),
    "aten::mv": (),
    "aten::convolution": (),
    "aten::convolution_backward": (),
    "aten::_scaled_dot_product_flash_attention_for_cpu": (1,),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": (),
}


@functools.cache
def _emulated(func: Any) -> tuple[int, ...] | None:
    schema = func._schema  # noqa: SLF001 - its public name
    # An `out=` form shares the name and writes into an argument, which a copy would miss.
    return None if schema.is_mutable else _EMULATED.get(schema.name)


class HalfEmulation(OwnMode):
    """Computes FP16 products on a CPU in FP32 and rounds the results to FP16.

    Tensor cores do the same (FP16 operands, FP32 accumulation, FP16 result), and a native FP16
    product is about 200 times slower than FP32 on a CPU. `used` tells whether any op was emulated,
    so that the run can be labelled. `seen` is told of every op and what it returned.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.used = False
        self.seen: Callable[[Any, Any], object] | None = None

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return self.execute(func, args, kwargs or {})

    def execute(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run one op, and tell of it where somebody wants to know."""
        output = self._execute(func, args, kwargs)
        if self.seen is not None:
            self.seen(func, output)
        return output

    def _execute(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run one op, emulated where it is an FP16 product on a CPU."""
        stays = _emulated(func)
        if stays is None or not any(map(_is_half_on_cpu, pytree.arg_tree_leaves(*args, **kwargs))):
            return func(*args, **kwargs)
        self.used = True
        args, kwargs = pytree.tree_map_only(Tensor, _widen, (args, dict(kwargs)))
        output = func(*args, **kwargs)
        if isinstance(output, Tensor):
            return _narrow(output)
        return tuple(
            _narrow(value) if isinstance(value, Tensor) and position not in stays else value
            for position, value in enumerate(output)
        )


def _is_half_on_cpu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float16 and value.device.type == "cpu"


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _narrow(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.dtype == torch.float32 else tensor
