"""Which elements of a storage a view looks at, and whether two views have one in common."""

import functools
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from nanhunt import measurement

# Steps after which the exact answer is given up; two views then count as overlapping.
_MAX_WORK = 10_000


class Region(NamedTuple):
    """The bytes of a storage that a view looks at."""

    start: int
    end: int
    item: int
    shape: tuple[int, ...]
    steps: tuple[int, ...]

    @property
    def is_solid(self) -> bool:
        """Whether there is no gap between its elements."""
        size = self.item
        for length in self.shape:
            size *= length
        return size >= self.end - self.start

    def meets(self, other: "Region") -> bool:
        """Whether two views of one storage have an element in common, or may have."""
        if self.end <= other.start or other.end <= self.start:
            return False
        if self.is_solid and other.is_solid:
            return True
        memory = _memory(1 << max(self.end, other.end).bit_length())
        one, two = _laid(self, memory), _laid(other, memory)
        try:
            return np.shares_memory(one, two, max_work=_MAX_WORK)  # type: ignore[arg-type]
        except np.exceptions.TooHardError:
            return True

    def is_within(self, other: "Region") -> bool:
        """Whether every element of it is known to belong to another region."""
        if self == other:
            return True
        return other.is_solid and other.start <= self.start and self.end <= other.end


@functools.lru_cache(maxsize=2)
def _memory(size: int) -> "np.ndarray[Any, Any]":
    """Memory on which regions are laid to be compared; never touched, so the system gives none."""
    return np.zeros(size, np.uint8)


def _laid(region: Region, memory: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    return np.ndarray(region.shape, f"V{region.item}", memory, region.start, region.steps)


def region_of(tensor: Tensor) -> Region:
    """The region of its storage that a tensor looks at."""
    values = measurement.dense(tensor)
    item = values.element_size()
    shape, steps = tuple(values.shape), tuple(int(step) * item for step in values.stride())
    start = int(values.storage_offset()) * item
    reach = sum((length - 1) * step for length, step in zip(shape, steps, strict=True))
    return Region(start, start + reach + item if values.numel() else start, item, shape, steps)
