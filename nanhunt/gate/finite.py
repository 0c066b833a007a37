"""Are the loss, the gradients and the parameters after one step finite, in every variant?"""

import math
from collections.abc import Iterator

from nanhunt.gate.case import Case, Found, short, title
from nanhunt.records import Finding, Run


def check_loss(case: Case) -> Iterator[Found]:
    """NH001, of every run."""
    for run in case.report.runs:
        if run.raised is not None:
            yield Found("not run", f"the variant raised {run.raised}", title(run))
        elif math.isfinite(run.loss):
            yield Found("passed", f"the loss is {run.loss:.4g}", title(run))
        else:
            yield _failed(case, run, f"the loss is {run.loss}")


def check_gradients(case: Case) -> Iterator[Found]:
    """NH002, of every run with a finite loss."""
    for run in case.report.runs:
        trained = sum(group.parameters - group.without_gradient for group in run.groups)
        if run.raised is not None:
            yield Found("not run", f"the variant raised {run.raised}", title(run))
        elif not math.isfinite(run.loss):
            yield Found("not run", "the loss is not finite already", title(run))
        elif not run.nonfinite:
            yield Found("passed", f"{trained} gradients are finite", title(run))
        else:
            yield _failed(case, run, f"{run.nonfinite} of {trained} gradients are not finite")


def check_parameters(case: Case) -> Iterator[Found]:
    """NH003, of every run that took an optimizer step."""
    for run in case.report.runs:
        if run.stepped_nonfinite:
            what = f"{run.stepped_nonfinite} parameters are not finite after the optimizer step"
            yield _failed(case, run, what)
        elif run.raised is not None:
            yield Found("not run", f"the variant raised {run.raised}", title(run))
        elif not math.isfinite(run.loss) or run.nonfinite:
            yield Found("not run", "no step is taken with non-finite gradients", title(run))
        elif not run.stepped:
            told = [note for note in run.notes if "optimizer" in note]
            why = told[0] if told else "the subject has no optimizer"
            yield Found("not run", why, title(run))
        else:
            yield Found("passed", "finite after one step", title(run))


def _failed(case: Case, run: Run, what: str) -> Found:
    """A variant that is not finite, with what made it so, as far as that was found."""
    file, line = _at(run)
    same = [f for f in case.report.culprits if (f.file, f.line) == (file, line)]
    if run is case.native:
        same = list(case.report.culprits)
    if same:
        first = same[0]
        told = f"{what}: {_told(first)}"
        return Found("finding", told, title(run), short(first.op), first.file, first.line)
    if run.culprit is None:
        return Found("finding", f"{what}; no operation was found that made it so", title(run))
    dtype = f" in {run.culprit_dtype}" if run.culprit_dtype else ""
    told = f"{what}: {short(run.culprit)}{dtype} makes the first of them"
    return Found("finding", told, title(run), short(run.culprit), file, line)


def _told(finding: Finding) -> str:
    """What a culprit is and why, in one sentence."""
    where = {"backward": " in its backward", "optimizer": " in the optimizer step"}
    place = " on the gradients" if finding.is_on_gradients else where.get(finding.phase, "")
    by = f"{short(finding.op)}{place} makes the first of them"
    if finding.phase == "data":
        by = f"{finding.where or finding.op} was not finite before the step"
    return f"{by}. {finding.explanation}" if finding.explanation else by


def _at(run: Run) -> tuple[str, int] | tuple[None, None]:
    """File and line of what a run's culprit is."""
    file, separator, line = (run.culprit_line or "").rpartition(":")
    return (file, int(line)) if separator and line.isdigit() else (None, None)
