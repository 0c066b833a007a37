"""What a gate concluded, and what changed between two reports."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nanhunt.records.concluded import Report

Status = Literal["passed", "finding", "allowed", "not run"]

UNSTEADY = "NH010"  # the check whose finding says that no other can be relied on


@dataclass(frozen=True, slots=True)
class Checked:
    """One check of one case, and of one variant where it looks at several.

    `name` is the parameter, term, weight, group or op that it is about; `file` and `line` are the
    user's line at fault, `config_line` the line of the configuration that asked for the case.
    `reason` is that of the allowance, if one applies.
    """

    check: str
    case: str
    status: Status
    message: str
    variant: str = ""
    name: str = ""
    file: str | None = None
    line: int | None = None
    config_line: int = 1
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything that a gate has to say.

    `broken` are the cases that could not be run, each with the sentence that says why; `reports`
    are what the checks were made on. `config` is the file that asked for them.
    """

    checked: tuple[Checked, ...]
    config: str = "pyproject.toml"
    broken: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    reports: tuple[Report, ...] = ()
    seconds: float = 0.0

    @property
    def findings(self) -> tuple[Checked, ...]:
        """What keeps the gate shut."""
        return tuple(one for one in self.checked if one.status == "finding")

    @property
    def counts(self) -> Mapping[str, int]:
        """How many checks passed, found something, are allowed, and were not run."""
        counted = Counter(one.status for one in self.checked)
        return {
            "passed": counted["passed"],
            "findings": counted["finding"],
            "allowed": counted["allowed"],
            "not_run": counted["not run"],
        }

    @property
    def exit_code(self) -> int:
        """0 passed, 1 findings, 2 a case could not be run, 3 it does not come out twice the same.

        What could not be run goes before the rest, and what is not reproducible before what was
        found in it.
        """
        if self.broken:
            return 2
        if any(one.check == UNSTEADY for one in self.findings):
            return 3
        return 1 if self.findings else 0

    @property
    def verdict(self) -> str:
        """The exit code in words."""
        return ("passed", "refused", "could not run", "not reproducible")[self.exit_code]


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as before; an empty text stands for what is not there at all."""

    topic: str
    name: str
    before: str
    after: str
