"""Text: a table of an evaluation as aligned lines, which are Markdown as well."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ris_model.config import Scenario
from ris_model.evaluation.table import Bound, Row, Table

_HEADS = (
    "method",
    "phi/theta/r",
    "> 5 deg",
    "missed",
    "false",
    "K right",
    "success",
    "GOSPA",
    "err/CRB",
    "ms",
)


def write_table(table: Table) -> Iterator[str]:
    """Lines of a table, one part for each K and SNR.

    Medians in degrees, degrees and metres; what is missed or false in percent of the true sources,
    the other rates in percent of the scenes; GOSPA in metres; the median of |angle error| over
    sqrt(CRB), of which an efficient estimate has 0.674; milliseconds of processor time per scene.
    """
    for bound in table.bounds:
        rows = [r for r in table.rows if (r.sources, r.snr_db) == (bound.sources, bound.snr_db)]
        yield f"K = {bound.sources}, {bound.snr_db:g} dB"
        yield ""
        yield from align([_HEADS, *map(_write_row, rows), _write_bound(bound)])
        yield ""


def describe_scenes(scenario: Scenario) -> str:
    """Say what a table is of: without this, two tables cannot be compared."""
    bits = "continuous" if scenario.code_bits is None else f"{scenario.code_bits}-bit"
    return (
        f"K-factor {scenario.rician_min:g} to {scenario.rician_max:g} dB, pairs of |<a1, a2>| < "
        f"{scenario.correlation_max:g}, powers {scenario.power_law}, {bits} {scenario.codebook} "
        f"codes, ranges {scenario.range_min:g} to {scenario.range_max:g} m; medians over sources"
    )


def align(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Cells with bars between them, a rule below the first row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for index, row in enumerate(rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "| " + " | ".join(cells) + " |"
        if index == 0:
            yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"


def write_median(median: tuple[float, float, float]) -> str:
    """Degrees, degrees, metres from radians, radians, metres."""
    return f"{math.degrees(median[0]):.3f}/{math.degrees(median[1]):.3f}/{median[2]:.3f}"


def _write_row(row: Row) -> tuple[str, ...]:
    """Cells of one method."""
    figures = row.figures
    rates = (figures.outliers, figures.misses, figures.alarms, figures.right, figures.success)
    return (
        row.method,
        write_median(figures.median),
        *(f"{100 * rate:.1f}" for rate in rates),
        f"{figures.gospa:.3f}",
        f"{row.over_bound:.3f}",
        f"{row.ms:.2f}",
    )


def _write_bound(bound: Bound) -> tuple[str, ...]:
    """Cells of the bound."""
    return ("0.674 sqrt(CRB)", write_median(bound.sigma), *("",) * 6, "0.674", "")
