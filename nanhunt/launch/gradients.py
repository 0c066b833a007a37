"""The gradients that an optimizer is about to use: one cheap look at all, and the exact one."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from nanhunt import measurement
from nanhunt.recorder import unrecorded

_WIDE = frozenset([torch.float32, torch.float64])
# Copying so few elements side by side costs less than a call for each tensor.
_SMALL = 16384
_flatten: Callable[[list[Tensor]], Tensor] = torch._C._nn.flatten_dense_tensors  # noqa: SLF001


def parameters_of(optimizer: Any) -> list[Tensor]:
    """Every tensor that an optimizer steps."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def gradients_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients that there are."""
    return [grad for parameter in parameters if (grad := parameter.grad) is not None]


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured, in which nothing can be waited for."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def losses_among(roots: Iterable[Any]) -> list[Tensor]:
    """What a backward starts from, where it is a single number."""
    tensors = (root for root in roots if isinstance(root, Tensor) and root.is_floating_point())
    return [measurement.local(root.detach()) for root in tensors if root.numel() == 1]


def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all elements are finite: memory speed, one wait for each device."""
    with unrecorded(), torch.no_grad():
        return _are_clear(tensors) or not bad_among(tensors)


def bad_among(tensors: Sequence[Tensor]) -> list[int]:
    """Positions of the tensors that hold NaN or an infinity, counted exactly."""
    with unrecorded(), torch.no_grad():
        return measurement.bad_among(tensors)


def _are_clear(tensors: Sequence[Tensor]) -> bool:
    """Whether the sums of squares show that all is finite; False also on overflow."""
    total = 0.0
    small: dict[torch.dtype, list[Tensor]] = {}
    others: list[Tensor] = []
    for tensor in tensors:
        if not (tensor.dtype in _WIDE and tensor.is_cpu and _is_plain(tensor)):
            others.append(tensor)
        elif tensor.numel() > _SMALL:
            flat = tensor.view(-1)
            total += torch.dot(flat, flat).item()
        else:
            small.setdefault(tensor.dtype, []).append(tensor)
    for group in small.values():
        flat = _flatten(group)
        total += torch.dot(flat, flat).item()
    return total - total == 0.0 and (not others or _are_others_clear(others))


def _are_others_clear(tensors: Sequence[Tensor]) -> bool:
    """The same for what is not plain, not wide, or not on the CPU."""
    total = 0.0
    elsewhere: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if not measurement.can_be_nonfinite(tensor) or is_lazy(tensor):
            continue
        values = measurement.local(tensor)
        if not measurement.has_values(values):
            continue
        if values.is_cpu or values.is_complex() or values.layout is not torch.strided:
            total += torch.inf if measurement.is_suspect(measurement.dense(values)) else 0.0
        else:
            elsewhere.setdefault(values.device, []).append(values)
    for group in elsewhere.values():
        # float16 and narrower overflow on their own sums long before any element does.
        norms = torch._foreach_norm(group, 2, dtype=torch.float32)  # noqa: SLF001 - no public name
        total += torch.stack(norms).sum().item()
    return total - total == 0.0


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.is_contiguous() and type(tensor) is Tensor
