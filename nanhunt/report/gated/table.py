"""The outcome of a gate on a terminal: the verdict, findings, every check, what was not run."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from nanhunt.gate.table import BY_ID, CHECKS
from nanhunt.records import Checked, Outcome
from nanhunt.report.gated.rows import Row, counted, merged, rows_of
from nanhunt.report.layout import Column, Sheet, beside, said

_STYLES = {0: "bold white on green", 1: "bold white on red", 2: "bold white on red", 3: "bold"}
_MARGIN = 8


def render(outcome: Outcome) -> RenderableType:
    """The whole page."""
    return Page(outcome)


@dataclass(frozen=True, slots=True)
class Page:
    """The page, laid out when the width of the console is known."""

    outcome: Outcome

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the lines."""
        outcome, sheet = self.outcome, Sheet(console, options.max_width)
        word = outcome.verdict.upper()
        number = len(outcome.reports) + len(outcome.broken)
        cases = f"{number} case{'' if number == 1 else 's'} of {outcome.config}"
        yield said((f" {word} ", _STYLES[outcome.exit_code]), f"  {counted(outcome)} · {cases}")
        yield Text("─" * sheet.width, "dim")
        for case, why in outcome.broken:
            yield from _entry(sheet, ("not run", "red"), f"{case} could not be run", why)
        for row in rows_of(outcome, "finding"):
            yield from _finding(sheet, row, "bold red")
        for row in rows_of(outcome, "allowed"):
            yield from _finding(sheet, row, "yellow")
        yield from sheet.tabled(_table(outcome))
        yield from _not_run(sheet, outcome)
        for note in outcome.notes:
            yield from _entry(sheet, ("note", "dim"), note)


def _entry(sheet: Sheet, label: tuple[str, str], *texts: str) -> Iterator[Text]:
    """Paragraphs beside a label."""
    lines = [line for text in texts for line in sheet.inside(_MARGIN).wrapped(said(text))]
    yield from beside(said(label), lines, _MARGIN)


def _finding(sheet: Sheet, row: Row, style: str) -> Iterator[Text]:
    one = row.first
    spot = [f"{one.file}:{one.line}"] if one.file else []
    allowed = [f"allowed: {one.reason}"] if one.status == "allowed" else []
    texts = (one.message, *spot, row.where, *allowed)
    yield from _entry(sheet, (one.check, style), *filter(None, texts))
    yield Text()


def _table(outcome: Outcome) -> list[Column]:
    """One line per check: what it asks for, and how often it came out how."""

    def count(check: str, status: str) -> Text:
        number = sum(one.check == check and one.status == status for one in outcome.checked)
        style = "red" if number and status == "finding" else ""
        return said((str(number) if number else "–", style))

    ids = [check.id for check in CHECKS]
    return [
        Column("Check", [said(check) for check in ids]),
        Column("asks that", [said(check.title) for check in CHECKS]),
        Column("passed", [count(check, "passed") for check in ids]),
        Column("found", [count(check, "finding") for check in ids]),
        Column("allowed", [count(check, "allowed") for check in ids], rank=1),
        Column("not run", [count(check, "not run") for check in ids]),
    ]


def _not_run(sheet: Sheet, outcome: Outcome) -> Iterator[Text]:
    """Why checks were not run: one line for each check and reason."""
    reasons: dict[tuple[str, str], list[Checked]] = {}
    for one in outcome.checked:
        if one.status == "not run":
            reasons.setdefault((one.check, one.message), []).append(one)
    if reasons:
        yield Text()
        yield said(("Not run", "bold"), ", and so not passed")
    for (check, why), group in reasons.items():
        which = merged(one.variant for one in group)
        text = f"{BY_ID[check].title}: {why}" + (f" ({which})" if which else "")
        yield from _entry(sheet, (check, ""), text)
