"""The one look at a step: loss, gradient norms and loss scale, read off the device together."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._foreach_utils import (
    _group_tensors_by_device_and_dtype,
    _has_foreach_support,
)

from nanhunt import measurement
from nanhunt.watching.held import Held

_EMPTY = torch.tensor(0.0)


@dataclass(slots=True)
class Pulse:
    """What was read at the end of a backward.

    `losses` and `flags` are those of each micro-batch, a flag being finite where the gradients
    were after it; `norms` are of the single gradients, at `positions` among the parameters; `bad`
    are the positions of those that really hold something non-finite, and `alarm` says that some
    process had a reason to skip. `total` is the norm of all of them, still on the device.
    """

    losses: list[float]
    flags: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    positions: Sequence[int] = ()
    norm: float = 0.0
    scale: float | None = None
    bad: tuple[int, ...] = ()
    alarm: bool = False
    total: Tensor = _EMPTY

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradients are."""
        return not self.bad and all(map(math.isfinite, self.losses))

    @property
    def first_bad(self) -> int:
        """The first micro-batch after which something was not finite, else the last."""
        for index, loss in enumerate(self.losses):
            if not math.isfinite(loss):
                return index
            if index < len(self.flags) and not math.isfinite(self.flags[index]):
                return index
        return len(self.losses) - 1


def measure_norms(gradients: list[Tensor]) -> tuple[list[Tensor], list[int], Tensor]:
    """The norm of each gradient, in which order, and that of all: as `get_total_norm` takes them.

    The sum goes over devices and dtypes in that function's order, so that clipping by it gives the
    same bits.
    """
    if not gradients:
        return [], [], _EMPTY
    values = [g if g.layout is torch.strided else _values(g) for g in gradients]
    norms: list[Tensor] = []
    order: list[int] = []
    table = _group_tensors_by_device_and_dtype([values], with_indices=True)  # type: ignore[list-item]
    for (device, _), ([found], indices) in table.items():
        tensors: list[Tensor] = found  # type: ignore[assignment]
        norms += _norms_on(tensors, device)
        order += indices
    first = values[0].device
    total = torch.linalg.vector_norm(torch.stack([norm.to(first) for norm in norms]), 2.0)
    return norms, order, total


def _norms_on(tensors: list[Tensor], device: torch.device) -> Sequence[Tensor]:
    if _has_foreach_support(tensors, device):
        return torch._foreach_norm(tensors, 2.0)  # noqa: SLF001 - no public name
    return [torch.linalg.vector_norm(tensor, 2.0) for tensor in tensors]


def _values(gradient: Tensor) -> Tensor:
    """The values of a sparse gradient; entries of one place are added first."""
    if gradient.layout is torch.sparse_coo:
        return gradient.coalesce().values()
    return gradient.values()


@torch.no_grad()
def flag_gradients(held: Held) -> Tensor:
    """A number on the device that is finite if the gradients are, by and large."""
    return measure_norms(held.gradients()[0])[2]


@torch.no_grad()
def take_pulse(
    held: Held,
    losses: Sequence[Tensor],
    *,
    flags: Sequence[Tensor] = (),
    scale: Tensor | None = None,
    agree: Callable[[Tensor], Tensor] | None = None,
) -> Pulse:
    """Measure a step with one wait for the device.

    Args:
        held: whose gradients.
        losses: of each micro-batch, as the closure returned them.
        flags: what `flag_gradients` gave after each of them.
        scale: the loss scale, on the device.
        agree: told 1 if this process has a reason to skip, else 0; answers for all of them.
    """
    gradients, positions = held.gradients()
    norms, order, total = measure_norms(gradients)
    home = losses[0].device
    ends = [*losses, *flags, total] if scale is None else [*losses, *flags, total, scale]
    rest = [end.detach().reshape(()).to(home) for end in ends]
    row = torch.stack([*(norm.to(home) for norm in norms), *rest])
    if agree is not None:
        alarm = agree(row.isfinite().all().logical_not().to(torch.float32))
        row = torch.cat([row, alarm.reshape(1).to(home)])
    read: list[float] = row.tolist()
    alarmed = read.pop() > 0 if agree is not None else False
    scale_read = read.pop() if scale is not None else None
    sizes, read = read[: len(norms)], read[len(norms) :]
    pulse = Pulse(
        losses=read[: len(losses)],
        flags=read[len(losses) : -1],
        norms=sizes,
        positions=[positions[i] for i in order],
        norm=read[-1],
        scale=scale_read,
        alarm=alarmed,
        total=total,
    )
    if not math.isfinite(pulse.norm):
        _look_again(pulse, [gradients[i] for i in order])
    return pulse


def _look_again(pulse: Pulse, gradients: Sequence[Tensor]) -> None:
    """Count exactly: the squares of large finite numbers do not fit, and that is no failure."""
    bad = []
    for index, (gradient, norm) in enumerate(zip(gradients, pulse.norms, strict=True)):
        if math.isfinite(norm):
            continue
        if measurement.count(gradient).is_finite:
            pulse.norms[index] = _large_norm(measurement.dense(gradient))
        else:
            bad.append(pulse.positions[index])
    pulse.bad = tuple(bad)
    pulse.norm = math.hypot(*pulse.norms)


def _large_norm(values: Tensor) -> float:
    wide = values.abs().float() if values.dtype != torch.float64 else values.abs()
    largest = wide.max()
    return float(largest) * float(torch.linalg.vector_norm(wide / largest))


@torch.no_grad()
def clip(held: Held, pulse: Pulse, limit: float) -> float | None:
    """Scale the gradients down as `clip_grad_norm_` does, with the norm that is known already.

    Returns:
        The factor; None where the norm is within the limit.
    """
    gradients, _ = held.gradients()
    if not gradients:
        return None
    factor = (limit / (pulse.total + 1e-6)).clamp(max=1.0)
    strided = [g for g in gradients if g.layout is torch.strided]
    others = [g for g in gradients if g.layout is not torch.strided]
    if strided:
        table = _group_tensors_by_device_and_dtype([strided])  # type: ignore[list-item]
        for (device, _), ([found], _) in table.items():
            torch._foreach_mul_(found, factor.to(device))  # type: ignore[arg-type]
    for gradient in others:
        gradient.mul_(factor.to(gradient.device))
    value = limit / (pulse.norm + 1e-6)
    return value if value < 1.0 else None
