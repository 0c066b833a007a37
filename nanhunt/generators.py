"""The random generators of Python, numpy and torch: where they stand, as data, and setting them."""

import ctypes
import functools
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Generators:
    """Where every global random generator stands at one moment.

    `python` and `numbers` are what `random.getstate` and `numpy.random.get_state` return, `cpu`
    and `devices` the states of torch's generators, uint8 tensors; one for each CUDA device that
    this process uses.
    """

    python: tuple[Any, ...]
    numbers: tuple[Any, ...]
    cpu: Tensor
    devices: tuple[Tensor, ...] = ()


def read_generators() -> Generators:
    """Where the generators stand now."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return Generators(random.getstate(), _NUMPY.read(), torch.get_rng_state(), tuple(devices))


class _Numpy:
    """Where numpy's generator stands, asked again only once it has moved.

    To be told costs 35 µs, as much as all the rest of a watched step; to see that the memory of a
    Mersenne twister is the same costs one. A number that it holds back from a pair of normal ones
    lies elsewhere, so without one in hand equal memory is an equal state.
    """

    _SIZE = 625 * 4  # 624 words and a position

    def __init__(self) -> None:
        self._seen: tuple[Any, bytes] = (None, b"")
        self._state: Any = ()

    def read(self) -> Any:
        source: Any = np.random.get_bit_generator()  # type: ignore[attr-defined]  # untyped
        if not isinstance(source, np.random.MT19937):
            return np.random.get_state(legacy=False)  # noqa: NPY002 - users draw from it
        seen = source, ctypes.string_at(source.ctypes.state_address, self._SIZE)
        if not (self._state and self._seen == seen and self._state[3] == 0):
            state: Any = np.random.get_state()  # noqa: NPY002 - as above
            self._seen, self._state = seen, state
        return self._state


_NUMPY = _Numpy()


def set_generators(to: Generators) -> None:
    """Put the generators where they stood; devices that this process lacks are left out."""
    random.setstate(to.python)
    np.random.set_state(to.numbers)  # noqa: NPY002 - as above
    torch.set_rng_state(to.cpu)
    here = torch.cuda.device_count() if to.devices else 0
    for index, state in enumerate(to.devices[:here]):
        torch.cuda.set_rng_state(state, index)


@functools.cache
def _has_devices() -> bool:
    return torch.accelerator.is_available()


def seed_generators(seed: int) -> None:
    """Set every random generator as the start of each replay has it."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - as above
    if _has_devices():
        torch.manual_seed(seed)
    else:  # `manual_seed` takes longer than a small model's forward to tell devices that are absent
        torch.default_generator.manual_seed(seed)
