"""The course of a number in a few characters."""

import math
from collections.abc import Sequence
from statistics import median

BLOCKS = "▁▂▃▄▅▆▇█"
LETTERS = "_.-=+*#@"  # where blocks cannot be shown; each darker than the one before
LOST, ABSENT = "x", " "
_DECADES = 100.0  # a range beyond this is drawn in logarithms


def draw(values: Sequence[float | None], width: int, *, blocks: bool = True) -> str:
    """The values from left to right; `x` where one was not finite.

    More values than there is room for are taken together by their medians.
    """
    parts = _parted(values, width)
    known = [part for part in parts if part is not None]
    if not known:
        return LOST * len(parts)
    shape = math.log10 if is_logarithmic(known) else float
    low, high = shape(min(known)), shape(max(known))
    marks = BLOCKS if blocks else LETTERS

    def mark(value: float | None) -> str:
        if value is None:
            return LOST
        part = (shape(value) - low) / (high - low) if high > low else 0.5
        return marks[min(int(part * len(marks)), len(marks) - 1)]

    return "".join(map(mark, parts))


def is_logarithmic(values: Sequence[float]) -> bool:
    """Whether the values span so much that only their digits can be compared."""
    return min(values) > 0 and max(values) / min(values) > _DECADES


def _parted(values: Sequence[float | None], width: int) -> list[float | None]:
    """At most `width` values; None where any of those taken together was not finite."""
    count = min(width, len(values))
    parts = []
    for i in range(count):
        part = values[i * len(values) // count : (i + 1) * len(values) // count]
        finite = [value for value in part if value is not None]
        parts.append(median(finite) if len(finite) == len(part) else None)
    return parts
