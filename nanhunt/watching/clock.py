"""The clock of a step: how much of its time was the training's, and how much ours."""

import time


class _Turn:
    """Whose time it is, inside of a `with` block; one that is entered often, so a plain class."""

    __slots__ = ("_begun", "sign", "spent")

    def __init__(self, sign: float) -> None:
        self.sign, self.spent, self._begun = sign, 0.0, 0.0

    def __enter__(self) -> None:
        self._begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.spent += self.sign * (time.perf_counter() - self._begun)


class Clock:
    """Runs from `start`.

    What happens in `outside` is the training's own, and what happens in `inside`, in the midst of
    that, is ours.
    """

    def __init__(self) -> None:
        self._start = 0.0
        self.outside, self.inside = _Turn(1.0), _Turn(-1.0)

    def start(self) -> None:
        """Begin a step."""
        self._start = time.perf_counter()
        self.outside.spent = self.inside.spent = 0.0

    def read(self) -> tuple[float, float]:
        """Seconds since the start, and those of them that were ours."""
        total = time.perf_counter() - self._start
        return total, total - self.outside.spent - self.inside.spent
