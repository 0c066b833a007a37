"""Lines that fit: the few shapes of which a page for the terminal is made.

Text from a report is data: it is shown as it is, never read as markup, and what cannot be printed
is escaped. Every line is at most as wide as its sheet.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from nanhunt.records import Finding, Phase

GAP = 2
NARROWEST = 6


def clean(words: str) -> str:
    """The words on one line, with escapes for what a terminal would obey or not show."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)


def number(value: float) -> str:
    """Four significant digits; `nan` and `inf` as such."""
    return f"{value:.4g}"


def short(op: str) -> str:
    """An op without the namespace and the overload that nearly all ops share."""
    return op.removeprefix("aten::")


_PLACES: dict[Phase, str] = {
    "data": "in what the step started from",
    "forward": "in the forward",
    "backward": "in its backward",
    "optimizer": "in the optimizer step",
}


def half_of(finding: Finding) -> str:
    """In which part of the step a culprit ran."""
    return "on the gradients" if finding.is_on_gradients else _PLACES[finding.phase]


def said(*parts: str | tuple[str, str]) -> Text:
    """Words, or pairs of words and a style, as one text."""
    text = Text()
    for part in parts:
        words, style = (part, "") if isinstance(part, str) else part
        text.append(clean(words), style)
    return text


def clipped(text: Text, width: int) -> Text:
    """The text in one line, its end elided where it does not fit."""
    line = text.copy()
    line.truncate(width, overflow="ellipsis")
    return line


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table; where room is short, columns of the highest `rank` are left out.

    Columns of rank 0 always stay.
    """

    head: str
    cells: Sequence[Text]
    rank: int = 0

    @property
    def width(self) -> int:
        """Room that the widest entry takes."""
        return max(cell_len(self.head), *(cell.cell_len for cell in self.cells), 0)


@dataclass(frozen=True, slots=True)
class Grid:
    """A table that is yet to be laid out, and what is said below it.

    A span takes the place of everything right of its row's first cell.
    """

    columns: Sequence[Column] = ()
    spans: Mapping[int, Text] = field(default_factory=dict)
    below: Sequence[Text] = ()


@dataclass(frozen=True, slots=True)
class Sheet:
    """Paper of a certain width."""

    console: Console
    width: int

    def inside(self, margin: int) -> "Sheet":
        """What is left of the paper beside a margin."""
        return replace(self, width=max(self.width - margin, NARROWEST))

    def wrapped(self, text: Text) -> list[Text]:
        """The text in lines, broken between words; no line where there is no text."""
        lines = list(text.wrap(self.console, self.width, overflow="fold")) if text else []
        for line in lines:
            line.rstrip()
        return lines

    def flowed(self, parts: Sequence[str], joint: str) -> list[Text]:
        """The parts in a row, broken only before a joint."""
        rows: list[str] = []
        for part in map(clean, parts):
            if rows and cell_len(rows[-1] + joint + part) <= self.width:
                rows[-1] += joint + part
            else:
                rows.append(f"{joint.lstrip()}{part}" if rows else part)
        return [line for row in rows for line in self.wrapped(Text(row))]

    def shown(self, grid: Grid) -> list[Text]:
        """A table, and the lines below it."""
        lines = self.tabled(grid.columns, grid.spans) if grid.columns else []
        return [*lines, *(line for text in grid.below for line in self.wrapped(text))]

    def tabled(
        self, columns: Sequence[Column], spans: Mapping[int, Text] | None = None
    ) -> list[Text]:
        """A head and rows; a span takes the place of everything right of its row's first cell."""
        kept = self._fitting(columns)
        widths = self._widths(kept)
        rows = [[Text(column.head, "bold") for column in kept]]
        rows += [[column.cells[i] for column in kept] for i in range(len(kept[0].cells))]
        for i, span in (spans or {}).items():
            rows[i + 1][1:] = [span]
        return [self._row(row, widths) for row in rows]

    def fits(self, columns: Sequence[Column]) -> bool:
        """Whether the columns fit side by side with nothing left out or elided."""
        return sum(column.width + GAP for column in columns) - GAP <= self.width

    def _fitting(self, columns: Sequence[Column]) -> list[Column]:
        """The columns for which there is room."""
        kept = list(columns)
        while not self.fits(kept):
            last = max(range(len(kept)), key=lambda i: (kept[i].rank, i))
            if kept[last].rank == 0:
                break
            del kept[last]
        return kept

    def _widths(self, columns: Sequence[Column]) -> list[int]:
        """The width of each column; where they are too wide together, the widest gives way."""
        widths = [column.width for column in columns]
        room = self.width - GAP * (len(columns) - 1)
        while sum(widths) > room and max(widths) > NARROWEST:
            widths[widths.index(max(widths))] -= 1
        return widths

    def _row(self, cells: Sequence[Text], widths: Sequence[int]) -> Text:
        """One line of a table; the last cell has what is left of the line."""
        line = Text()
        for cell, width in zip(cells[:-1], widths, strict=False):
            entry = clipped(cell, width)
            entry.pad_right(width + GAP - entry.cell_len)
            line += entry
        line += cells[-1]
        line.rstrip()
        return clipped(line, self.width)


def beside(label: Text, lines: Sequence[Text], margin: int) -> list[Text]:
    """The lines behind a margin, with a label in it on the left of the first."""
    head = label.copy()
    head.pad_right(max(margin - head.cell_len, 0))
    return [(Text(" " * margin) if i else head) + line for i, line in enumerate(lines)]
