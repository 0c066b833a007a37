"""The clock of a step: how much of its time was the training's, and how much ours."""

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Runs from `start`; what happens in `outside` is the training's own."""

    def __init__(self) -> None:
        self._start = self._outside = 0.0

    def start(self) -> None:
        """Begin a step."""
        self._start, self._outside = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """The training works."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._outside += time.perf_counter() - begun

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """We work, in the midst of what is the training's."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._outside -= time.perf_counter() - begun

    def read(self) -> tuple[float, float]:
        """Seconds since the start, and those of them that were ours."""
        total = time.perf_counter() - self._start
        return total, total - self._outside
