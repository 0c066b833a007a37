"""One case as the checks see it, and what a check says of it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from nanhunt.gate.policy import Gated
from nanhunt.records import Checked, Report, Run, Status


@dataclass(frozen=True, slots=True)
class Case:
    """One report, what was asked of it, and the norms that the baseline has for it.

    `norms` is None where there is no baseline at all, and `missing` says why.
    """

    name: str
    report: Report
    rule: Gated
    norms: Mapping[str, Mapping[str, float]] | None = None
    missing: str = ""

    @property
    def native(self) -> Run:
        """The run as given; every case has one."""
        return next(run for run in self.report.runs if run.variant == "native" and not run.ablated)

    @property
    def given(self) -> tuple[Run, ...]:
        """The runs with the whole objective."""
        return tuple(run for run in self.report.runs if not run.ablated)


@dataclass(frozen=True, slots=True)
class Found:
    """What one check says of one variant, one parameter or one term."""

    status: Status
    message: str
    variant: str = ""
    name: str = ""
    file: str | None = None
    line: int | None = None


Check: TypeAlias = Callable[[Case], Iterable[Found]]


def title(run: Run) -> str:
    """The variant, and what was taken out of its objective."""
    return run.variant + (f" − {', '.join(run.ablated)}" if run.ablated else "")


def make_checked(check: str, case: Case, found: Found) -> Checked:
    """What a check said, with the case that it said it of."""
    return Checked(
        check=check,
        case=case.name,
        status=found.status,
        message=found.message,
        variant=found.variant,
        name=found.name,
        file=found.file,
        line=found.line,
        config_line=case.rule.line,
    )


def short(op: str) -> str:
    """An op without the namespace that nearly all share."""
    return op.removeprefix("aten::")
