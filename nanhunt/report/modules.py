"""What each module did, in both directions: the whole table, and the part around a culprit."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from nanhunt.records import ModuleFacts, Report
from nanhunt.report.layout import Column, Grid, Sheet, clean, number, said
from nanhunt.report.tables import BAD, NONE

AROUND = 8  # modules that a report shows; `--modules` prints all
_SHORT = {
    "float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16",
    "complex128": "c128", "complex64": "c64", "int64": "i64", "bool": "bool",
}  # fmt: skip


def render(report: Report) -> RenderableType:
    """The table of all modules."""
    return Page(report)


@dataclass(frozen=True, slots=True)
class Page:
    """The table, laid out when the width of the console is known."""

    report: Report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the rows, or say that there are none."""
        if not self.report.modules:
            yield Text("no module of the model was called")
            return
        sheet = Sheet(console, options.max_width)
        yield from sheet.shown(module_table(self.report.modules))


def around_culprit(report: Report, sheet: Sheet) -> list[Text]:
    """The modules on the way of the first culprit, and those next to them."""
    names = [row.module for row in report.modules]
    on_way = [s.module for finding in report.culprits[:1] for s in finding.path if s.module]
    on_way += [finding.module for finding in report.culprits[:1] if finding.module]
    if not names or not on_way:
        return []
    near = {names.index(name) + step for name in on_way if name in names for step in (-1, 0, 1)}
    rows = [row for i, row in enumerate(report.modules) if i in near][:AROUND]
    lines = sheet.shown(module_table(rows))
    if len(rows) < len(names):
        lines.append(said((f"{len(rows)} of {len(names)} modules; all with --modules", "dim")))
    return lines


def module_table(rows: Sequence[ModuleFacts]) -> Grid:
    """One line per module."""
    return Grid(
        [
            Column("Modules", [said(row.module) for row in rows]),
            Column("|out| max", [_figure(row.largest) for row in rows]),
            Column("rms", [_figure(row.rms) for row in rows], rank=2),
            Column("‖g‖ arriving", [_figure(row.gradient) for row in rows]),
            Column("non-finite", [_nonfinite(row) for row in rows]),
            Column("ops forward", [said(_ops(row.forward)) for row in rows], rank=1),
            Column("backward", [said(_ops(row.backward)) for row in rows], rank=3),
        ]
    )


def _figure(value: float | None) -> Text:
    return said(NONE if value is None else number(value))


def _nonfinite(row: ModuleFacts) -> Text:
    """Elements of outputs and of arriving gradients."""
    if not row.nonfinite_out and not row.nonfinite_gradient:
        return said(NONE)
    return said((f"{row.nonfinite_out} / {row.nonfinite_gradient}", BAD))


def _ops(counts: Sequence[tuple[str, int]]) -> str:
    return " ".join(f"{count} {short_dtype(dtype)}" for dtype, count in counts) or NONE


def short_dtype(dtype: str) -> str:
    """How a dtype is called where room is short."""
    return _SHORT.get(dtype, clean(dtype))
