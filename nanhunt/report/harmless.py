"""The non-finite values that reached neither loss, gradient nor parameter, in a line each."""

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from nanhunt.records import Report
from nanhunt.report.layout import Sheet, beside, said


def render(report: Report) -> RenderableType:
    """The list of them all."""
    return Page(report)


@dataclass(frozen=True, slots=True)
class Page:
    """The list, laid out when the width of the console is known."""

    report: Report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the lines, or say that there are none."""
        sheet = Sheet(console, options.max_width)
        yield said(("Harmless", "bold"))
        if not self.report.harmless:
            yield Text("no op made a non-finite value that reached nobody")
        for line in self.report.harmless:
            yield from beside(Text("·"), sheet.inside(2).wrapped(said(line)), 2)
