"""What several forms tell alike: findings of several variants that are one, and where they are."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath

from nanhunt.records import Checked, Outcome, Status


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that a check says, of all the variants of which it says it."""

    first: Checked
    variants: tuple[str, ...]

    @property
    def where(self) -> str:
        """Case and variants, in words."""
        return " · ".join(filter(None, [self.first.case, ", ".join(self.variants)]))


def rows_of(outcome: Outcome, *statuses: Status) -> list[Row]:
    """The checks with these statuses, in order; the same said of several variants is one row."""
    found: dict[tuple[object, ...], list[Checked]] = {}
    for one in outcome.checked:
        if one.status in statuses:
            key = (one.check, one.case, one.status, one.name, one.message, one.file, one.line)
            found.setdefault(key, []).append(one)
    return [
        Row(group[0], tuple(filter(None, (one.variant for one in group))))
        for group in found.values()
    ]


def place(one: Checked, config: str) -> tuple[str, int]:
    """A file below the folder of the configuration, and a line of it.

    Where no line of the user's own code is at fault, or it lies elsewhere on this machine, it is
    the line of the configuration that asked for the case.
    """
    if one.file is not None and one.line is not None and is_relative(one.file):
        return one.file.replace("\\", "/"), one.line
    return config, one.config_line


def is_relative(file: str) -> bool:
    """Whether a path says nothing about the machine that it is on."""
    is_rooted = PurePosixPath(file).is_absolute() or PureWindowsPath(file).is_absolute()
    return not is_rooted and ".." not in PurePosixPath(file).parts and not file.startswith("<")


def told(one: Checked) -> str:
    """The message; with its line where that cannot be the place of the annotation."""
    if one.file is not None and not is_relative(one.file):
        return f"{one.message} ({PurePosixPath(one.file.replace(chr(92), '/')).name}:{one.line})"
    return one.message


def counted(outcome: Outcome) -> str:
    """How many checks came out how, in one line."""
    counts = outcome.counts
    words = [
        f"{counts['findings']} finding{'' if counts['findings'] == 1 else 's'}",
        f"{counts['passed']} passed",
        f"{counts['allowed']} allowed",
        f"{counts['not_run']} not run",
    ]
    return " · ".join(words)


def merged(names: Iterable[str]) -> str:
    """Names in a row, each once."""
    return ", ".join(dict.fromkeys(filter(None, names)))
