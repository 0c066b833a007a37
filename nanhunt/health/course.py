"""The course of a run: its figures as series, and robust numbers of them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from statistics import median

from nanhunt.health.limits import LIMITS, Limits
from nanhunt.records import Figures

Series = Sequence[tuple[int, float]]  # positions in the run, and what was measured there

# The standard deviation of a normal distribution is 1.4826 of its median absolute deviation, and
# the standard error of a median 1.2533 of that of a mean.
_NORMAL = 1.4826
_MEDIAN = 1.2533


@dataclass(frozen=True)
class Course:
    """What the rules look at; positions count the figures from 0, whatever their steps are."""

    figures: Sequence[Figures]
    limits: Limits = LIMITS

    @cached_property
    def losses(self) -> Series:
        """The finite losses."""
        return [(i, f.loss) for i, f in enumerate(self.figures) if f.loss is not None]

    @cached_property
    def blocks(self) -> list[tuple[int, float]]:
        """The median loss of each block, at the position of its first step."""
        return self.blocked(self.losses)

    @cached_property
    def ranges(self) -> list[float]:
        """How far the medians of so many blocks, from the first on, lie apart."""
        values = [value for _, value in self.blocks]
        pairs = zip(accumulate(values, max), accumulate(values, min), strict=True)
        return [0.0, *(high - low for high, low in pairs)]

    @cached_property
    def totals(self) -> Series:
        """The norm of all gradients, where every group's is finite."""
        return [
            (i, math.hypot(*(norm for _, norm in f.norms if norm is not None)))
            for i, f in enumerate(self.figures)
            if f.norms and all(norm is not None for _, norm in f.norms) and not f.nonfinite
        ]

    @cached_property
    def groups(self) -> dict[str, Series]:
        """The finite gradient norms of each group."""
        found: dict[str, list[tuple[int, float]]] = {}
        for i, f in enumerate(self.figures):
            for name, norm in f.norms:
                if norm is not None:
                    found.setdefault(name, []).append((i, norm))
        return dict(found)

    @cached_property
    def updates(self) -> dict[str, Series]:
        """Update to weight of each group, where the learning rate was at work."""
        highest = max((rate for f in self.figures for rate in f.rates), default=0.0)
        found: dict[str, list[tuple[int, float]]] = {}
        for i, f in enumerate(self.figures):
            if f.stepped and (
                not f.rates or max(f.rates) >= self.limits.working_rate * highest > 0
            ):
                for name, ratio in f.updates:
                    found.setdefault(name, []).append((i, ratio))
        return dict(found)

    @cached_property
    def start(self) -> float | None:
        """The median loss of the first block."""
        return self.blocks[0][1] if self.blocks else None

    def blocked(self, series: Series) -> list[tuple[int, float]]:
        """The medians of the whole blocks of a series."""
        size = self.limits.block
        return [
            (series[k][0], median(value for _, value in series[k : k + size]))
            for k in range(0, len(series) - size + 1, size)
        ]

    def moved(self, count: int) -> float:
        """How far the loss has moved in its first `count` finite values, by medians of blocks."""
        return self.ranges[count // self.limits.block]

    def is_learning(self) -> bool:
        """Whether the loss is lower at the end than at the start, and as low as it ever was."""
        values = [value for _, value in self.blocks]
        if len(values) < 2:
            return False
        margin = 0.05 * abs(values[0] - min(values))
        return values[-1] < values[0] - 0.01 * abs(values[0]) and values[-1] <= min(values) + margin

    def step(self, position: int) -> int:
        """The number of the step at a position."""
        return self.figures[position].step


def without_nonfinite(figures: Sequence[Figures]) -> list[Figures]:
    """The figures with None where a NaN or an infinity was handed over in its place."""
    return [f if _is_clean(f) else _cleaned(f) for f in figures]


def _is_clean(f: Figures) -> bool:
    numbers = (f.loss, f.scale, f.clipped, f.validation, *f.rates)
    named = (*f.norms, *f.updates)
    return all(n is None or math.isfinite(n) for n in (*numbers, *(n for _, n in named)))


def _cleaned(f: Figures) -> Figures:
    return replace(
        f,
        loss=_finite(f.loss),
        scale=_finite(f.scale),
        clipped=_finite(f.clipped),
        validation=_finite(f.validation),
        rates=tuple(rate for rate in f.rates if math.isfinite(rate)),
        norms=tuple((name, _finite(norm)) for name, norm in f.norms),
        updates=tuple((name, ratio) for name, ratio in f.updates if math.isfinite(ratio)),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def spread(values: Sequence[float]) -> float:
    """The standard deviation, of which outliers know nothing."""
    middle = median(values)
    return _NORMAL * median(abs(value - middle) for value in values)


def error_of_median(values: Sequence[float]) -> float:
    """The standard error of the median of values that may drift: from their differences."""
    steps = [b - a for a, b in pairwise(values)]
    noise = spread(steps) / math.sqrt(2) if steps else 0.0
    return _MEDIAN * noise / math.sqrt(len(values))


def stretches(marks: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """The first and the last position of each stretch of true marks."""
    start: int | None = None
    for i, is_marked in enumerate([*marks, False]):
        if is_marked and start is None:
            start = i
        elif not is_marked and start is not None:
            yield start, i - 1
            start = None
