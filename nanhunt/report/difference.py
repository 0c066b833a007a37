"""What changed between two reports, as a table."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from nanhunt.records import Difference
from nanhunt.report.layout import Column, Sheet, said

_ABSENT = "–"


def render(changes: Sequence[Difference]) -> RenderableType:
    """The table, or a line that says that there is nothing to show."""
    return Page(tuple(changes))


@dataclass(frozen=True, slots=True)
class Page:
    """The table, laid out when the width of the console is known."""

    changes: tuple[Difference, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the rows."""
        if not self.changes:
            yield Text("the two reports tell the same")
            return
        sheet = Sheet(console, options.max_width)
        columns = [
            Column("", [said((one.topic, "bold")) for one in self.changes]),
            Column("changed", [said(one.name) for one in self.changes]),
            Column("before", [said(one.before or _ABSENT) for one in self.changes]),
            Column("after", [said(one.after or _ABSENT) for one in self.changes]),
        ]
        if sheet.fits(columns):
            yield from sheet.tabled(columns)
            return
        for one in self.changes:
            yield said((one.topic, "bold"), f"  {one.name}")
            for mark, text in (("−", one.before), ("+", one.after)):
                lines = sheet.inside(4).wrapped(said(f"{mark} {text or _ABSENT}"))
                yield from (Text("    ") + line for line in lines)
