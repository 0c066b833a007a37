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
from nanhunt.watching.ranks import total_norms

# From so far above 1 on, the factor is above it in the precision of the gradients too, as long as
# their norm is no number that could overflow there.
_CLEARLY, _SMALL = 1.02, 6e4


@dataclass(slots=True)
class Pulse:
    """What was read at the end of a backward.

    `losses` and `flags` are those of each micro-batch, a flag being finite where the gradients
    were after it; `norms` are of the single gradients, at `positions` among the parameters; `bad`
    are the positions of those that really hold something non-finite, and `alarm` says that some
    process had a reason to skip. `on_device` are the norms as they were measured.
    """

    losses: list[float]
    flags: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    positions: Sequence[int] = ()
    norm: float = 0.0
    scale: float | None = None
    bad: tuple[int, ...] = ()
    alarm: bool = False
    on_device: Sequence[Tensor] = ()

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


def measure_norms(gradients: list[Tensor]) -> tuple[list[Tensor], list[int]]:
    """The norm of each gradient, and in which order: devices and dtypes as `get_total_norm` does.

    The sum over them depends on it in the last bit.
    """
    if not gradients:
        return [], []
    values = [g if g.layout is torch.strided else _values(g) for g in gradients]
    norms: list[Tensor] = []
    order: list[int] = []
    table = _group_tensors_by_device_and_dtype([values], with_indices=True)  # type: ignore[list-item]
    for (device, _), ([found], indices) in table.items():
        tensors: list[Tensor] = found  # type: ignore[assignment]
        norms += _norms_on(tensors, device)
        order += indices
    return norms, order


def total_of(norms: Sequence[Tensor], home: torch.device) -> Tensor:
    """The norm of all gradients together, on a device."""
    if not norms:
        return torch.zeros((), device=home)
    total: Tensor = torch.linalg.vector_norm(torch.stack([n.to(home) for n in norms]), 2.0)
    return total


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
    norms, _ = measure_norms(held.gradients()[0])
    return total_of(norms, held.parameters[0].device)


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
    norms, order = measure_norms(gradients)
    if held.is_spread:
        norms = list(total_norms(norms))
    home = losses[0].device
    ends = [*losses, *flags] if scale is None else [*losses, *flags, scale]
    row = torch.stack([measurement.local(end).reshape(()).to(home) for end in [*norms, *ends]])
    if agree is not None:
        alarm = agree(row.isfinite().all().logical_not().to(torch.float32))
        row = torch.cat([row, alarm.reshape(1).to(home)])
    read: list[float] = row.tolist()
    alarmed = read.pop() > 0 if agree is not None else False
    scale_read = read.pop() if scale is not None else None
    sizes, read = read[: len(norms)], read[len(norms) :]
    pulse = Pulse(
        losses=read[: len(losses)],
        flags=read[len(losses) :],
        norms=sizes,
        positions=[positions[i] for i in order],
        norm=math.hypot(*sizes),
        scale=scale_read,
        alarm=alarmed,
        on_device=norms,
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
    value = limit / (pulse.norm + 1e-6)
    if value > _CLEARLY and pulse.norm < _SMALL:
        return None  # multiplied by 1 they would be the same
    gradients, _ = held.gradients()
    if not gradients:
        return None
    # The norm is summed anew on the device: read and sent back it would have other bits.
    factor = (limit / (total_of(pulse.on_device, gradients[0].device) + 1e-6)).clamp(max=1.0)
    strided = [g for g in gradients if g.layout is torch.strided]
    others = [g for g in gradients if g.layout is not torch.strided]
    if strided:
        table = _group_tensors_by_device_and_dtype([strided])  # type: ignore[list-item]
        for (device, _), ([found], _) in table.items():
            torch._foreach_mul_(found, factor.to(device))  # type: ignore[arg-type]
    for gradient in others:
        gradient.mul_(factor.to(gradient.device))
    return value if value < 1.0 else None
