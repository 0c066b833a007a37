"""A report for an issue or a pull request: the verdict in full, the tables folded away.

Text from a report is data: it neither formats the page, nor links, nor calls anybody by `@name`.
"""

import re
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text

from nanhunt.records import Finding, Report
from nanhunt.report import tables, trials, verdict
from nanhunt.report.layout import Grid, Sheet, clean
from nanhunt.report.repro import sentence

WIDE = 100_000  # letters: nothing is left out of a table for want of room
STATIONS = 8
_SPECIAL = re.compile(r"([\\`*\[\]<>#|~&$]|(?<!\w)_|_(?!\w))")
_CALLS = re.compile(r"([@#])(?=\w)")
_SCHEMES = re.compile(r"(?<=\w)(:)(?=//)|(?<=www)(\.)", re.IGNORECASE)


def render(report: Report) -> str:
    """The whole text, one paragraph per thing that is said."""
    blocks = [*_head(report), *_verdict(report), *_tables(report), *_foot(report)]
    return "\n\n".join(filter(None, blocks)) + "\n"


def plain(words: object) -> str:
    """The words as they read, whatever Markdown would make of them."""
    told = str(words.plain if isinstance(words, Text) else words)
    told = _SPECIAL.sub(r"\\\1", clean(told))
    return _SCHEMES.sub(
        "\\g<0>\u200b", _CALLS.sub("\\1\u200b", told)
    )  # nothing is linked or called


def code(words: str) -> str:
    """The words as code within a line."""
    told = clean(words).strip() or " "
    runs = re.findall("`+", told)
    fence = "`" * (max(map(len, runs), default=0) + 1)
    pad = " " if told.startswith("`") or told.endswith("`") else ""
    return f"{fence}{pad}{told}{pad}{fence}"


def block(lines: Sequence[str], language: str) -> str:
    """Lines as a block of code."""
    told = [clean(line.expandtabs(4).rstrip()) for line in lines]
    runs = [len(run) for line in told for run in re.findall("`+", line)]
    fence = "`" * max(3, *(run + 1 for run in runs), 0)
    return "\n".join([f"{fence}{language}", *told, fence])


def _head(report: Report) -> Iterator[str]:
    word, _, told = verdict.title(report)
    yield f"### {word}: {plain(told)}"
    yield plain(" · ".join(verdict.subject(report)))


def _verdict(report: Report) -> Iterator[str]:
    """What broke, where and why, and what cures it; of a healthy step what was run."""
    if report.verdict == "healthy":
        yield _said("ran", " · ".join(verdict.replays(report)))
        yield _said("precision", report.precision)
        return
    yield _listed(verdict.risks(report))
    for i, finding in enumerate(report.culprits, start=1):
        yield from _culprit(report, finding, f" {i}" if len(report.culprits) > 1 else "")
    if not report.culprits:
        yield _said("where", " ".join(text.plain for text in verdict.unplaced(report)))
    yield from _cure(report)
    yield _said("repro", sentence(report))


def _culprit(report: Report, finding: Finding, mark: str) -> Iterator[str]:
    place = verdict.place(finding).plain
    yield f"**where{mark}** {code(place)} at {code(verdict.spot(finding))}"
    if finding.source:
        yield block([finding.source.strip()], "python")
    yield plain(verdict.owner(report, finding))
    yield _said("why", verdict.why(finding))
    if finding.evidence:
        yield "**measured**\n\n" + _listed(finding.evidence)
    if finding.cause:
        yield f"**cause** {code(finding.cause)}"
    names = [name for name, _ in verdict.stations(finding.path)]
    if len(names) > STATIONS:
        cut = f"… {len(names) - STATIONS + 1} more …"
        names = [*names[: STATIONS - 4], cut, *names[-3:]]
    counts = [f"poisoned parameters: {', '.join(verdict.poisoned(finding))}"]
    way = [" → ".join(names)] if names else []
    yield _said("path", " · ".join([*way, *(counts if finding.poisoned else [])]))


def _cure(report: Report) -> Iterator[str]:
    """The fix and its proof, then what was taken out and replayed."""
    for told in trials.sole_cause(report):
        yield _said("sole cause", told)
    yield _said("fix", trials.fix(report).plain)
    found = trials.best(report)
    if found is not None and found.before is not None and found.after is not None:
        yield block([f"- {found.before.strip()}", f"+ {found.after.strip()}"], "diff")
    elif found is not None:
        yield plain(trials.in_words(found))
    yield plain(trials.refuted(report))
    rows = map(verdict.removal, verdict.removals(report))
    yield "\n".join(f"- without {code(name)}: {plain(told)}" for name, told in rows)
    if verdict.is_cure_unsought(report):
        yield _said("cure", verdict.NO_CURE_SOUGHT)
    yield _said("to try", verdict.advice(report))


def _tables(report: Report) -> Iterator[str]:
    """Every table, folded."""
    sheet = Sheet(Console(width=WIDE), WIDE)
    yield _folded("Steps", _table(tables.pace(report)))
    yield _folded("Runs", _table(tables.runs(report, sheet)))
    yield _folded("Ablations", _table(tables.ablations(report)))
    yield _folded("Trials", _table(trials.table(report, WIDE)))
    rows = [(plain(a.asks), a.answer, plain(a.evidence)) for a in report.diagnosis]
    yield _folded("Diagnosis", _rows(("question", "answer", "evidence"), rows) if rows else "")


def _table(grid: Grid) -> str:
    """A table and what is said below it."""
    parts = []
    if grid.columns:
        count = len(grid.columns[0].cells)
        rows = [[plain(column.cells[i]).strip() for column in grid.columns] for i in range(count)]
        for i, span in grid.spans.items():
            rows[i][1:] = [plain(span)]
        parts.append(_rows([plain(column.head) for column in grid.columns], rows))
    return "\n\n".join([*parts, *map(plain, grid.below)])


def _rows(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _foot(report: Report) -> Iterator[str]:
    """Further facts, what was not looked at, and the command that repeats it."""
    facts = verdict.facts(report)
    yield "**notes**\n\n" + _listed(facts) if facts else ""
    yield _said("not checked", " · ".join(report.not_checked))
    if report.command:
        yield f"again: {code(report.command)}"


def _said(label: str, words: str) -> str:
    """A sentence behind its label; nothing where there is none."""
    return f"**{label}** {plain(words)}" if words else ""


def _listed(lines: Sequence[str | Text]) -> str:
    return "\n".join(f"- {plain(line)}" for line in lines)


def _folded(title: str, body: str) -> str:
    if not body:
        return ""
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"
