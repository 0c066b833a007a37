"""A report in a few plain lines: what fits into the message of an exception."""

import textwrap
from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from nanhunt.records import Finding, Rank, RankState, Report
from nanhunt.report.layout import clean, half_of, short

WIDTH = 100
MARGIN = 10
_RANKS: dict[RankState, str] = {
    "culprit": "the value is born in its own part of the step",
    "received": "its part is finite until it receives the value from another rank",
    "finite": "its own part of the step is finite",
    "unexplained": "cannot tell",
    "missing": "did not answer in time, not checked",
}


def render(report: Report) -> RenderableType:
    """The same lines for a console."""
    return Text(tell(report))


def tell(report: Report) -> str:
    """What is non-finite; for the first culprit where, why, and what was measured."""
    lines = textwrap.wrap(clean(report.headline or report.verdict), WIDTH)
    if report.culprits:
        lines += _culprit(report.culprits[0])
    elif report.verdict == "unexplained":
        lines += _labelled("where", ["cannot tell: no op was found that made it of finite numbers"])
    lines += _labelled("ranks", [told_rank(row) for row in report.ranks])
    return "\n".join(lines)


def told_rank(row: Rank) -> str:
    """What one of several processes found."""
    return f"rank {row.rank}: {_RANKS[row.state]}{f': {row.culprit}' if row.culprit else ''}"


def _culprit(finding: Finding) -> Iterator[str]:
    inside = " → ".join(filter(None, [finding.node, short(finding.formula_op or "")]))
    head = f"{short(finding.op)}, {half_of(finding)}" + (f" · {inside}" if inside else "")
    spot = f"{finding.file}:{finding.line}" if finding.file else ""
    if spot and finding.function:
        spot += f" in {finding.function}"
    owner = [f"module {finding.module}" if finding.module else "", finding.dtype]
    owner += [f"step {finding.step} of the block"] if finding.step else []
    source = f"  {finding.source.strip()}" if finding.source else ""
    places = [head, spot or finding.where or "line of code not known", source]
    yield from _labelled("where", [*places, " · ".join(filter(None, owner))])
    no_cause = "" if finding.cause else "no known cause matches the evidence"
    yield from _labelled("why", [finding.explanation or no_cause])
    yield from _labelled("measured", finding.evidence)
    if finding.cause:
        yield from _labelled("cause", [f"{finding.cause} · nanhunt explain {finding.cause}"])
    if finding.recipes:
        yield from _labelled("to try", [", ".join(finding.recipes) + " (not replayed)"])


def _labelled(label: str, texts: Iterator[str] | list[str] | tuple[str, ...]) -> Iterator[str]:
    """Paragraphs beside a label; an indented one stays so."""
    head = f"  {label}".ljust(MARGIN + 2)
    for text in filter(str.strip, texts):
        indent = " " * (len(text) - len(text.lstrip()))
        for line in textwrap.wrap(clean(text.strip()), WIDTH - MARGIN - 2 - len(indent)):
            yield f"{head}{indent}{line}"
            head = " " * (MARGIN + 2)
