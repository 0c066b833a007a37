"""The script of the first culprit: which events are its own, and from which state they come."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath

from nanhunt import analysis
from nanhunt.analysis import Suspect
from nanhunt.errors import SubjectError
from nanhunt.hunting.investigation import Investigation
from nanhunt.records import Finding, Reproduction
from nanhunt.replay import take_steps
from nanhunt.repro import Target, check_folder, reproduce
from nanhunt.structure import count_samples
from nanhunt.subject import told


@dataclass(frozen=True, slots=True)
class Order:
    """Where the script is to be written, and of which culprit: by default whichever is found.

    Raises:
        UsageError: nothing can be written there.
    """

    folder: Path
    wanted: Finding | None = None

    def __post_init__(self) -> None:
        check_folder(self.folder)


def is_same(one: Finding, other: Finding) -> bool:
    """Whether two findings are of the same culprit, for the same reason."""
    return _key(one) == _key(other)


def _key(finding: Finding) -> tuple[object, ...]:
    # Only the file's name: the path is told from where the command runs.
    file = PurePath(finding.file).name if finding.file else None
    return finding.phase, finding.op, file, finding.line, finding.cause


def reproduced(
    investigation: Investigation, order: Order, restart: Callable[[], None]
) -> Reproduction | None:
    """Write and run the script of the first culprit; None where there is none, or another one.

    Args:
        investigation: its native replay is done, and its subject stands before the last step.
        order: what is to be written.
        restart: puts the subject back to where the first of several steps began.
    """
    found = investigation.culprits[0] if investigation.culprits else None
    if found is None or (order.wanted is not None and not is_same(found, order.wanted)):
        return None
    if found.phase == "data":
        return Reproduction(
            "", works=False, note=f"no op made it: {found.where} was non-finite before the step"
        )
    suspect = _suspect(investigation, found)
    if suspect is None:
        return Reproduction("", works=False, note="its op is not in the trace of the plain replay")
    investigation.progress("the culprit alone")
    trace = investigation.native.trace if investigation.native else None
    event = suspect.events[0]
    events = [e for e in (trace.events if trace else ()) if e.step == event.step]
    target = Target(found, event, events)
    subject, batch = investigation.subject, investigation.batch
    if event.step != subject.step:
        # A step before has left it: that one is replayed, from where all of them began.
        restart()
        first = investigation.pace[0].step
        count, progress = event.step - first + 1, investigation.progress
        course = take_steps(subject, first, count, progress, may_end_left_out=True)
        subject, batch = course.subject, course.batch
    try:
        return reproduce(subject, batch, target, order.folder)
    except (SubjectError, RuntimeError) as error:
        # Memory may not suffice for the copies; the rest of the report is worth having.
        return Reproduction("", works=False, note=f"it could not be made: {told(error)}")


def _suspect(investigation: Investigation, found: Finding) -> Suspect | None:
    """Whose events a finding tells of."""
    trace = investigation.native.trace if investigation.native else None
    samples = count_samples(investigation.batch)
    suspects = analysis.find_suspects(trace, samples=samples) if trace else ()
    return next((s for s in suspects if s.events and _mark(s.finding) == _mark(found)), None)


def _mark(finding: Finding) -> tuple[object, ...]:
    """What an inquiry about a suspect does not change."""
    return (
        finding.phase,
        finding.op,
        finding.node,
        finding.formula_op,
        finding.line,
        finding.module,
        finding.occurrence,
        finding.step,
    )
