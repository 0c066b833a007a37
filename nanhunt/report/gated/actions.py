"""The outcome of a gate as annotations of GitHub Actions: one workflow command per finding."""

from nanhunt.gate.table import BY_ID
from nanhunt.records import Outcome
from nanhunt.report.gated.rows import place, rows_of, told

_DATA = {"%": "%25", "\r": "%0D", "\n": "%0A"}
_PROPERTY = {**_DATA, ":": "%3A", ",": "%2C"}


def render(outcome: Outcome) -> str:
    """The lines for standard output."""
    lines = [
        _command(outcome.config, 1, "nanhunt gate", f"{case} could not be run: {why}")
        for case, why in outcome.broken
    ]
    for row in rows_of(outcome, "finding"):
        file, line = place(row.first, outcome.config)
        title = f"{row.first.check} {BY_ID[row.first.check].slug}"
        text = f"{told(row.first)} ({row.where})" if row.where else told(row.first)
        lines.append(_command(file, line, title, text))
    return "".join(f"{line}\n" for line in lines)


def _command(file: str, line: int, title: str, text: str) -> str:
    where = f"file={_escaped(file, _PROPERTY)},line={line},title={_escaped(title, _PROPERTY)}"
    return f"::error {where}::{_escaped(text, _DATA)}"


def _escaped(text: str, escapes: dict[str, str]) -> str:
    return "".join(escapes.get(letter, letter) for letter in text)
