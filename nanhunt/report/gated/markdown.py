"""The outcome of a gate in Markdown, for a pull request or the summary of a job."""

import re

from nanhunt.gate.table import BY_ID, CHECKS
from nanhunt.records import Outcome, Status
from nanhunt.report.gated.rows import Row, counted, rows_of, told
from nanhunt.report.layout import clean

_SIGNS = {0: "✅", 1: "❌", 2: "⚠️", 3: "⚠️"}
# What Markdown, its tables or HTML would read as something else than text.
_MARKS = re.compile(r"([\\`*_{}\[\]<>#|~!@])")


def render(outcome: Outcome) -> str:
    """The whole text."""
    lines = [
        f"## {_SIGNS[outcome.exit_code]} nanhunt gate: {outcome.verdict}",
        "",
        counted(outcome),
    ]
    for case, why in outcome.broken:
        lines += ["", f"- **{plain(case)}** could not be run: {plain(why)}"]
    sections: tuple[tuple[str, Status], ...] = (("Findings", "finding"), ("Allowed", "allowed"))
    for title, status in sections:
        rows = rows_of(outcome, status)
        if rows:
            lines += ["", f"### {title}", "", *map(_entry, rows)]
    lines += ["", "### Checks", "", "| check | asks that | passed | found | allowed | not run |"]
    lines += ["|---|---|---|---|---|---|"]
    for check in CHECKS:
        statuses: tuple[Status, ...] = ("passed", "finding", "allowed", "not run")
        found = [one.status for one in outcome.checked if one.check == check.id]
        cells = " | ".join(str(found.count(s) or "–") for s in statuses)
        lines += [f"| {check.id} | {check.title} | {cells} |"]
    unrun = rows_of(outcome, "not run")
    if unrun:
        lines += ["", "<details><summary>Not run, and so not passed</summary>", ""]
        lines += [f"- {r.first.check}: {plain(r.first.message)} ({plain(r.where)})" for r in unrun]
        lines += ["", "</details>"]
    lines += [f"\n{plain(note)}" for note in outcome.notes]
    return "\n".join(lines) + "\n"


def _entry(row: Row) -> str:
    one = row.first
    spot = f"<br>`{clean(one.file).replace('`', '')}:{one.line}`" if one.file else ""
    reason = f"<br>allowed: {plain(one.reason)}" if one.status == "allowed" else ""
    title = f"**{one.check}** {BY_ID[one.check].slug}"
    where = f"<br>{plain(row.where)}" if row.where else ""
    return f"- {title}: {plain(told(one))}{spot}{where}{reason}"


def plain(text: str) -> str:
    """Text that stays what it is."""
    return _MARKS.sub(r"\\\1", clean(text)).replace("\\<", "&lt;").replace("\\>", "&gt;")
