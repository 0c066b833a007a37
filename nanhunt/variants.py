"""The ways in which a replay can differ from the step as given: precisions and ablations."""

import contextlib
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nanhunt.errors import UsageError
from nanhunt.interventions import HalfEmulation, PrecisionRewriting, dtype_under
from nanhunt.recorder import carried_into_threads, compiled_code_run_eagerly
from nanhunt.structure import map_tensors
from nanhunt.subject import Subject


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to replay a step.

    `precision` upcasts everything; `autocast` runs under autocast, the whole step or (`net_only`)
    the root module's forward alone. `scaled` applies GradScaler's rule. `without` are weights or
    terms taken out of the objective, `alone` the terms left in it (empty: all).
    """

    name: str = "native"
    precision: Literal["float32", "float64"] | None = None
    autocast: Literal["float16", "bfloat16"] | None = None
    net_only: bool = False
    scaled: bool = False
    without: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()

    def ablated(self, *names: str) -> "Variant":
        """The same variant without some weights or terms."""
        return replace(self, without=(*self.without, *names))

    def only(self, *terms: str) -> "Variant":
        """The same variant with some terms alone."""
        return replace(self, alone=terms)


NATIVE = Variant()
VARIANTS: Mapping[str, Variant] = {
    variant.name: variant
    for variant in (
        NATIVE,
        Variant("fp64", precision="float64"),
        Variant("fp32", precision="float32"),
        Variant("amp-fp16", autocast="float16", scaled=True),
        Variant("amp-bf16", autocast="bfloat16"),
        Variant("amp-fp16-net", autocast="float16", scaled=True, net_only=True),
        Variant("amp-bf16-net", autocast="bfloat16", net_only=True),
    )
}
DEFAULT = ("native", "fp64", "fp32", "amp-fp16-net", "amp-bf16-net")


def variant(name: str) -> Variant:
    """Look a variant up by its name.

    Raises:
        UsageError: there is no such variant; the sentence lists them.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    near = difflib.get_close_matches(name, VARIANTS, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UsageError(f"no precision is called {name!r}; {hint}known: {', '.join(VARIANTS)}")


@dataclass(slots=True)
class Execution:
    """What a variant did while it was applied: notes for the report."""

    half: HalfEmulation
    root_forwards: int = 0


@contextlib.contextmanager
def beneath(*, record: bool = False, half: bool = True) -> Iterator[Execution]:
    """Prepare what stands below the recorder, so that it sees ops as the step asked them.

    A recorder executes the emulation itself: one mode costs half of two. Without `half` there is
    none: where everything is upcast, nothing is left to emulate. Compiled code runs eagerly, or the
    compiler would trace the modes.
    """
    execution = Execution(HalfEmulation())
    # FP16 may come from the variant or from the subject's own autocast.
    emulation = execution.half if half and not record else contextlib.nullcontext()
    with compiled_code_run_eagerly(), carried_into_threads(), emulation:
        yield execution


@contextlib.contextmanager
def above(variant: Variant, subject: Subject, execution: Execution) -> Iterator[None]:
    """Enter the modes that stand above the recorder, so that it sees what they made of the ops."""
    with contextlib.ExitStack() as stack:
        if variant.precision is not None:
            real = getattr(torch, variant.precision)
            cast_model(subject, real)
            torch.set_default_dtype(real)
            stack.enter_context(PrecisionRewriting(real))
        if variant.autocast is not None:
            dtype = getattr(torch, variant.autocast)
            device = device_of(subject.model)
            if variant.net_only:
                stack.enter_context(_autocast_forward(subject.model, device, dtype, execution))
            else:
                stack.enter_context(torch.autocast(device, dtype=dtype))
        yield


def device_of(model: nn.Module) -> str:
    """The device type of a model's first parameter."""
    return next((p.device.type for p in model.parameters()), "cpu")


def cast_model(subject: Subject, real: torch.dtype) -> None:
    """Give parameters, buffers and optimizer state another precision, in place."""
    for tensor in (*subject.parameters(), *subject.model.buffers()):
        tensor.data = tensor.data.to(dtype_under(tensor.dtype, real))
    if subject.optimizer is not None:
        for values in subject.optimizer.state.values():
            for value in values.values():
                if isinstance(value, Tensor) and value.dim():
                    value.data = value.data.to(dtype_under(value.dtype, real))


def cast_batch(variant: Variant, batch: Any) -> Any:
    """A copy of the batch in the precision of the variant; the original is never written to."""
    if variant.precision is None:
        return map_tensors(batch, _copy)
    real = getattr(torch, variant.precision)
    return map_tensors(batch, lambda t: _copy(t).to(dtype_under(t.dtype, real)))


def _copy(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    return copied.requires_grad_(tensor.requires_grad)


@contextlib.contextmanager
def _autocast_forward(
    model: nn.Module, device: str, dtype: torch.dtype, execution: Execution
) -> Iterator[None]:
    """Autocast around the root module's forward; its floating outputs leave in FP32."""
    entered: list[torch.autocast] = []

    def enter(_module: nn.Module, _args: Any) -> None:
        execution.root_forwards += 1
        entered.append(torch.autocast(device, dtype=dtype))
        entered[-1].__enter__()

    def leave(_module: nn.Module, _args: Any, output: Any) -> Any:
        if entered:
            entered.pop().__exit__(None, None, None)
        return map_tensors(output, _to_float) if output is not None else None

    handles = (
        model.register_forward_pre_hook(enter),
        model.register_forward_hook(leave, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        while entered:
            entered.pop().__exit__(None, None, None)


def _to_float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
