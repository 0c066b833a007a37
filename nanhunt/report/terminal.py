"""A report for the terminal: what broke and where, why, what cures it; then tables for doubters.

What was measured, what follows from it and what was replayed stand apart. Colour only repeats what
the words say, and nothing is wider than the console.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from nanhunt.records import Finding, Report, Step
from nanhunt.report import tables, trials, verdict
from nanhunt.report.layout import Sheet, beside, clipped, said
from nanhunt.report.modules import around_culprit
from nanhunt.report.repro import sentence
from nanhunt.report.tables import FAINT

PROSE = 100  # no line of prose is longer, however wide the console is
MARGIN = 11  # of where, why, measured, cause, cure
FOOT = 13  # of Path, Notes, Not checked
STATIONS = 6
SHOWN = 5  # ablations beside `cure`; all are in the table


def render(report: Report) -> RenderableType:
    """The report as something that a rich console prints at whatever width it has."""
    return Page(report)


@dataclass(frozen=True, slots=True)
class Page:
    """A report laid out when the width of the console is known."""

    report: Report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the sections with an empty line between them."""
        sheet = Sheet(console, options.max_width).inside(1)
        sections = _HEALTHY if self.report.verdict == "healthy" else _SECTIONS
        yield from _header(self.report, Sheet(console, options.max_width))
        for section in sections:
            for i, line in enumerate(section(self.report, sheet)):
                if i == 0:
                    yield Text()
                yield Text(" ") + line


def _header(report: Report, sheet: Sheet) -> list[Text]:
    """What was examined, with what, on what; with short versions where the line is short."""
    lines: list[Text] = []
    for numbers in (3, 2):
        lines = sheet.flowed(verdict.subject(report, numbers), " · ")
        if len(lines) == 1:
            break
    return lines


# --- the verdict ---------------------------------------------------------------------------------


def _verdict(report: Report, sheet: Sheet) -> list[Text]:
    """What is non-finite, then for each culprit where and why, then what cures the step."""
    lines = [*_headline(report, sheet), Text("─" * sheet.width, FAINT)]
    narrow = sheet.inside(max(sheet.width - PROSE, 0))
    many = len(report.culprits) > 1
    lines += _labelled("variant", verdict.risks(report), narrow)
    for i, finding in enumerate(report.culprits, start=1):
        lines += _culprit(report, finding, f"{i} " if many else "", narrow)
    if not report.culprits:
        lines += _labelled("where", verdict.unplaced(report), narrow)
    lines += trials.verdict(report, narrow, MARGIN)
    lines += _cure(report, narrow) + _labelled("to try", [said(verdict.advice(report))], narrow)
    return lines + _labelled("repro", [said(sentence(report))], narrow)


def _headline(report: Report, sheet: Sheet) -> list[Text]:
    """The verdict in one word and one sentence."""
    word, style, sentence = verdict.title(report)
    margin = len(word) + 2
    lines = sheet.inside(margin).wrapped(said((sentence, "bold")))
    return beside(said((word, f"bold {style}")), lines, margin)


def _labelled(label: str, texts: Sequence[Text], sheet: Sheet) -> list[Text]:
    """Paragraphs beside a label; nothing where there are none."""
    inner = sheet.inside(MARGIN)
    return beside(said((label, "bold")), [w for t in texts for w in inner.wrapped(t)], MARGIN)


def _culprit(report: Report, finding: Finding, mark: str, sheet: Sheet) -> list[Text]:
    """One culprit: where it is, what follows, what was measured, and the name of the cause."""
    pad = " " * len(mark)
    inner = sheet.inside(MARGIN)
    measured = [line for words in finding.evidence for line in _bulleted(words, inner)]
    where = [verdict.place(finding), said(verdict.spot(finding))]
    if finding.source:
        where.append(said("  ", (finding.source.strip(), "italic")))
    where.append(said(verdict.owner(report, finding)))
    return [
        *_labelled(f"{mark}where", where, sheet),
        *_labelled(f"{pad}why", [said(verdict.why(finding))], sheet),
        *beside(said((f"{pad}measured", "bold")), measured, MARGIN),
        *_labelled(f"{pad}cause", [said(verdict.cause(finding))], sheet),
    ]


def _bulleted(words: str, sheet: Sheet) -> list[Text]:
    """One measured fact behind a dot."""
    return beside(Text("·"), sheet.inside(2).wrapped(said(words)), 2)


def _cure(report: Report, sheet: Sheet) -> list[Text]:
    """What was taken out and replayed: the cures first, then what does not cure."""
    tried = verdict.removals(report)
    if verdict.is_cure_unsought(report):
        return _labelled("cure", [said(verdict.NO_CURE_SOUGHT)], sheet)
    if not tried:
        return []
    inner = sheet.inside(MARGIN)
    rows = [verdict.removal(ablation) for ablation in tried]
    names = [name for name, _ in rows]
    lines = []
    if not tried[0].cures:
        lines += inner.wrapped(said("no cure found among ", ", ".join(names)))
    width = min(max(len("without "), *(cell_len(f"without {n}") for n in names[:SHOWN])) + 2, 40)
    for name, outcome in rows[:SHOWN]:
        texts = inner.inside(width).wrapped(outcome)
        lines += beside(clipped(said(f"without {name}"), width - 2), texts, width)
    if len(tried) > SHOWN:
        lines.append(said(f"… {len(tried) - SHOWN} more below"))
    return beside(said(("cure", "bold")), lines, MARGIN)


# --- the tables ----------------------------------------------------------------------------------


def _pace(report: Report, sheet: Sheet) -> list[Text]:
    return sheet.shown(tables.pace(report))


def _runs(report: Report, sheet: Sheet) -> list[Text]:
    return sheet.shown(tables.runs(report, sheet))


def _ablations(report: Report, sheet: Sheet) -> list[Text]:
    return sheet.shown(tables.ablations(report))


def _trials(report: Report, sheet: Sheet) -> list[Text]:
    return sheet.shown(trials.table(report, sheet.width))


# --- after the tables ----------------------------------------------------------------------------


def _path(report: Report, sheet: Sheet) -> list[Text]:
    """From each culprit to the first poisoned parameters, and how many are poisoned."""
    inner = sheet.inside(FOOT)
    many = len(report.culprits) > 1
    lines = []
    for i, finding in enumerate(report.culprits, start=1):
        rows = inner.flowed(_stations(finding.path), " → ")
        counts = verdict.poisoned(finding)
        if counts:
            rows += inner.flowed([f"poisoned parameters: {counts[0]}", *counts[1:]], " · ")
        lines += beside(said((f"Path {i}" if many else "Path", "bold")), rows, FOOT)
    return lines


def _stations(path: Sequence[Step]) -> list[str]:
    """The way in a few words: neighbours that are called the same are one station."""
    names = [name for name, _ in verdict.stations(path)]
    if len(names) <= STATIONS:
        return names
    return [*names[:3], f"… {len(names) - 5} more …", *names[-2:]]


def _notes(report: Report, sheet: Sheet) -> list[Text]:
    """Further measured facts, and what was not looked at."""
    inner = sheet.inside(FOOT)
    notes = [line for words in verdict.facts(report) for line in _bulleted(words, inner)]
    return [
        *beside(said(("Notes", "bold")), notes, FOOT),
        *beside(said(("Not checked", "bold")), inner.flowed(report.not_checked, " · "), FOOT),
    ]


# --- a healthy report ----------------------------------------------------------------------------


def _health(report: Report, sheet: Sheet) -> list[Text]:
    """Healthy, what was run, what was not."""
    inner = sheet.inside(FOOT)
    precision = [] if verdict.is_doubtful(report) else inner.wrapped(said(report.precision))
    return [
        *_headline(report, sheet),
        *beside(said(("Ran", "bold")), inner.flowed(verdict.replays(report), " · "), FOOT),
        *beside(said(("Precision", "bold")), precision, FOOT),
        *_notes(report, sheet),
    ]


def _doubts(report: Report, sheet: Sheet) -> list[Text]:
    """The runs, where not all of them are finite."""
    return _runs(report, sheet) if verdict.is_doubtful(report) else []


_Section = Callable[[Report, Sheet], list[Text]]
_HEALTHY: tuple[_Section, ...] = (_health, _pace, _doubts)
_SECTIONS: tuple[_Section, ...] = (
    _verdict,
    _pace,
    _runs,
    _ablations,
    _trials,
    tables.diagnosis,
    around_culprit,
    _path,
    _notes,
)
