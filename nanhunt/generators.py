"""The random generators of Python, numpy and torch: where they stand, as data, and setting them."""

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
    numbers: Any = np.random.get_state()  # noqa: NPY002 - users draw from it
    return Generators(random.getstate(), numbers, torch.get_rng_state(), tuple(devices))


def set_generators(to: Generators) -> None:
    """Put the generators where they stood; devices that this process lacks are left out."""
    random.setstate(to.python)
    np.random.set_state(to.numbers)  # noqa: NPY002 - as above
    torch.set_rng_state(to.cpu)
    here = torch.cuda.device_count() if to.devices else 0
    for index, state in enumerate(to.devices[:here]):
        torch.cuda.set_rng_state(state, index)


def seed_generators(seed: int) -> None:
    """Set every random generator as the start of each replay has it."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - as above
    torch.manual_seed(seed)
