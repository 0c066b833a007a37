"""The look at what an op returned, at memory speed or less: nearly every op is cleared here.

What this clears is finite. What it does not clear is counted exactly. Of some ops a part of the
output tells of all of it: one NaN in a row of a softmax makes all of the row NaN, and what a
normalisation returns is bounded by its statistics.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nanhunt import measurement

# Given the arguments of an op and what it returned: whether this is known to be finite.
Shortcut: TypeAlias = Callable[[tuple[Any, ...], Any], bool]

_WIDE = (torch.float32, torch.float64)
_WORTHWHILE = 16384  # elements from which on a shortcut is quicker than a look
_FLOAT32 = torch.float32
_STRIDED = torch.strided

# Whatever the weights of a normalisation, what it returns has room in FP32 when the mean and the
# weights are below the first and the inverse deviations between the other two: with n elements it
# is at most (mean + sqrt(n) / least) * most * weight, which for n below 1e10 is below 1e32.
_MOST_GIVEN = 1e6
_LEAST_INVERSE, _MOST_INVERSE = 1e-10, 1e6
_MOST_ELEMENTS = 1e10


def is_clear(tensor: Tensor) -> bool:
    """Whether one pass shows a tensor that an op returned to be finite; False: look closer."""
    dtype = tensor.dtype
    if (
        (dtype is _FLOAT32 or dtype in _WIDE)
        and tensor.layout is _STRIDED
        # Forward-mode derivatives hold zeros without memory, tracers no numbers at all.
        and not tensor._is_zerotensor()  # noqa: SLF001 - no public name
        and not tensor.is_meta
    ):
        # The common case first: this runs after every op.
        value = tensor.sum().item()
        return value - value == 0.0
    return dtype in measurement.EXACT or not measurement.suspects((tensor,))


def are_clear(tensors: Sequence[Tensor]) -> bool:
    """The same of several outputs, subclasses of tensors among them."""
    for tensor in tensors:
        if type(tensor) is Tensor:
            if not is_clear(tensor):
                return False
        elif measurement.suspects((tensor,)):
            return False
    return True


def is_cleared(
    shortcut: Shortcut | None, args: tuple[Any, ...], returned: Any, outputs: list[Tensor] | None
) -> bool:
    """Whether an op is known to have returned finite values.

    `outputs` are all that it returned or wrote to; None where it returned one plain tensor.
    """
    if shortcut is not None and shortcut(args, returned):
        return True
    return is_clear(returned) if outputs is None else are_clear(outputs)


def is_clear_at_first(args: tuple[Any, ...]) -> bool:
    """Whether what an op is about to write to is known to be finite."""
    return bool(args) and type(args[0]) is Tensor and is_clear(args[0])


class Look:
    """When a recorder looks at what ops return and overwrite: at once."""

    is_cleared = staticmethod(is_cleared)
    is_clear_at_first = staticmethod(is_clear_at_first)


AT_ONCE = Look()


def shortcut_of(base: str) -> Shortcut | None:
    """How an op may be cleared without looking at all that it returned; None: it cannot.

    It takes what was given to be finite. What comes from outside of the step unseen is met by the
    next op, so a shortcut is taken on large outputs only, where it saves something.
    """
    shortcut = _SHORTCUTS.get(base)
    if shortcut is None:
        return None

    def clears(args: tuple[Any, ...], returned: Any) -> bool:
        first = returned if isinstance(returned, Tensor) else returned[0]
        return first.numel() >= _WORTHWHILE and shortcut(args, returned)

    return clears


def _is_bounded(_args: tuple[Any, ...], returned: Any) -> bool:
    """An op that makes no non-finite real number of finite ones; of complex numbers it may."""
    return type(returned) is Tensor and not returned.is_complex()


def _is_scaled_down(args: tuple[Any, ...], returned: Any) -> bool:
    """A real product with a plain number that is at most 1."""
    factor = args[1] if len(args) > 1 else None
    return isinstance(factor, float | int) and abs(factor) <= 1 and _is_bounded(args, returned)


def _is_divided_down(args: tuple[Any, ...], returned: Any) -> bool:
    """A real quotient with a plain finite number that is at least 1."""
    divisor = args[1] if len(args) == 2 else None
    is_plain = isinstance(divisor, float | int) and 1 <= abs(divisor) < math.inf
    return is_plain and _is_bounded(args, returned)


def _has_clear_rows(args: tuple[Any, ...], returned: Any) -> bool:
    """A softmax: where a row holds one NaN it holds nothing else, and no infinity is possible."""
    if type(returned) is not Tensor or returned.layout is not _STRIDED or not returned.numel():
        return False
    if len(args) < 2 or not returned.dim() or returned.dtype not in _WIDE or returned.is_meta:
        return False
    value = returned.select(args[1], 0).sum().item()
    return bool(value - value == 0.0)


def _is_normalised(statistics: Sequence[Tensor], given: Sequence[Any], returned: Tensor) -> bool:
    mean, inverse = statistics
    n = returned.numel()
    if not 0 < n < _MOST_ELEMENTS or returned.dtype not in _WIDE or returned.is_meta:
        return False
    if mean.dtype not in _WIDE or not mean.numel() or mean.numel() * 4 > n:
        return False
    weights = [tensor for tensor in given if tensor is not None]
    if any(type(tensor) not in measurement.PLAIN for tensor in weights):
        return False
    limits = [_limits(tensor) for tensor in (mean, *weights)]
    least, most = _limits(inverse)
    is_moderate = all(-_MOST_GIVEN < low <= high < _MOST_GIVEN for low, high in limits)
    return _LEAST_INVERSE < least <= most < _MOST_INVERSE and is_moderate


def _limits(tensor: Tensor) -> tuple[float, float]:
    """The smallest and the largest number; NaN both where there is one."""
    low, high = tensor.aminmax()
    return low.item(), high.item()


def _has_clear_layers(args: tuple[Any, ...], returned: Any) -> bool:
    """A layer norm, known by the mean and the inverse deviation of every row."""
    out, mean, inverse = returned[:3]
    return _is_normalised((mean, inverse), args[2:4], out)


def _has_clear_channels(args: tuple[Any, ...], returned: Any) -> bool:
    """A batch norm in training, known by the mean and the inverse deviation of every channel."""
    out, mean, inverse = returned[:3]
    is_training = len(args) > 5 and args[5] is True
    running = [tensor for tensor in args[3:5] if tensor is not None]
    return is_training and _is_normalised((mean, inverse), args[1:3], out) and are_clear(running)


_SHORTCUTS: Mapping[str, Shortcut] = {
    "_softmax": _has_clear_rows,
    "_safe_softmax": _has_clear_rows,
    "gelu": _is_bounded,
    "mul": _is_scaled_down,
    "div": _is_divided_down,
    "native_batch_norm": _has_clear_channels,
    "native_layer_norm": _has_clear_layers,
    "sigmoid": _is_bounded,
    "silu": _is_bounded,
    "tanh": _is_bounded,
}
