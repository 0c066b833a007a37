"""Modules times variants: how large outputs and gradients are in each precision, side by side."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from nanhunt.records import ModuleFacts, Report
from nanhunt.report.layout import number
from nanhunt.report.tables import NONE

ROWS = 120  # modules that are set side by side; the report as JSON has them all
FACTOR = 2.0  # from which on a size counts as another one than that of the native replay


class Size(NamedTuple):
    """One field: the figure, and `bad`, `odd` or nothing as the class that colours it."""

    figure: str
    shade: str = ""


class Sizes(NamedTuple):
    """The variants, and per module the sizes of its outputs and of the gradients that arrive.

    A variant that is finite under a loss scale is not recorded.
    """

    variants: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Size, ...], tuple[Size, ...]], ...]
    left_out: int
    unrecorded: tuple[str, ...]


def compare_modules(report: Report) -> Sizes | None:
    """The modules of the native replay beside those of the variants; None where none has any."""
    others = {run.variant: run.modules for run in report.runs if run.modules and not run.ablated}
    if not others or not report.modules:
        return None
    tables = {name: {row.module: row for row in rows} for name, rows in others.items()}
    shown = outer_modules(report.modules, ROWS)
    rows = tuple(_row(native, [*tables.values()]) for native in shown)
    variants = [run.variant for run in report.runs if not run.ablated and run.raised is None]
    unrecorded = tuple(name for name in variants if name != "native" and name not in others)
    left_out = len(report.modules) - len(shown)
    return Sizes(("native", *others), rows, left_out, unrecorded)


def outer_modules(facts: Sequence[ModuleFacts], most: int) -> list[ModuleFacts]:
    """The modules down to the depth at which they are not too many."""
    for depth in sorted({row.module.count(".") for row in facts}, reverse=True):
        rows = [row for row in facts if row.module.count(".") <= depth]
        if len(rows) <= most:
            return rows
    return list(facts[:most])


def _row(
    native: ModuleFacts, others: Sequence[Mapping[str, ModuleFacts]]
) -> tuple[str, tuple[Size, ...], tuple[Size, ...]]:
    rows = [native, *(table.get(native.module) for table in others)]
    outputs = [(row.largest, row.nonfinite_out) if row else (None, 0) for row in rows]
    gradients = [(row.gradient, row.nonfinite_gradient) if row else (None, 0) for row in rows]
    return native.module, tuple(_sizes(outputs)), tuple(_sizes(gradients))


def _sizes(values: Sequence[tuple[float | None, int]]) -> Iterator[Size]:
    """The figures; marked where something is not finite or far from the first."""
    first = values[0][0]
    for value, nonfinite in values:
        if value is None:
            yield Size(NONE)
        elif nonfinite or not math.isfinite(value):
            yield Size(f"{number(value)} ✕" if math.isfinite(value) else number(value), "bad")
        else:
            yield Size(number(value), "odd" if _is_far(value, first) else "")


def _is_far(value: float, first: float | None) -> bool:
    if first is None or not math.isfinite(first) or value == first:
        return False
    low, high = sorted((abs(value), abs(first)))
    return high > FACTOR * low
