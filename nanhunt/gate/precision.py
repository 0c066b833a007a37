"""Does the loss keep its precision, and does the step come out twice the same?"""

import math
from collections.abc import Iterable, Iterator, Mapping

from nanhunt.gate.case import Case, Found, short, title
from nanhunt.gate.norms import ratio_of
from nanhunt.records import Group, Run


def check_halves(case: Case) -> Iterator[Found]:
    """NH009, of the step as given and of every variant under autocast."""
    watched = 0
    for run in case.given:
        if run.half_ops is None and run.raised is None:
            continue
        watched += 1
        if run.raised is not None:
            yield Found("not run", f"the variant raised {run.raised}", title(run))
        elif not run.loss_ops:
            told = "the loss is computed inside the model, where it cannot be told from it"
            yield Found("not run", told, title(run))
        elif not run.half_ops:
            yield Found("passed", f"{run.loss_ops} operations of the loss", title(run))
        for op in run.half_ops or ():
            name, times = short(op.op), f" ({op.times} times)" if op.times > 1 else ""
            told = f"{name} of the loss runs in {op.dtype}{times}"
            yield Found("finding", told, title(run), name, op.frame.file, op.frame.line)
    if not watched:
        yield Found("not run", "no replay watched the operations of the loss")


def check_steady(case: Case) -> Iterator[Found]:
    """NH010, of two native replays, or of the native one and one that ran the same ops."""
    if case.report.deterministic is None:
        yield Found("not run", "no second native replay was made", "native")
    elif case.report.deterministic:
        yield Found("passed", "two replays agree to the bit", "native")
    else:
        told = [note for note in case.report.notes if note.startswith("two native replays differ")]
        yield Found("finding", (told or ["two native replays differ"])[0], "native")


def check_fp64(case: Case) -> Iterator[Found]:
    """NH011, of the FP32 replay, or of the step as given where there is none."""
    double = next((run for run in case.given if run.variant == "fp64"), None)
    compared = [run for run in case.given if any(g.error is not None for g in run.groups)]
    if double is None or not compared:
        yield Found("not run", _not_compared(double))
        return
    wide = {group.name: group.norm for group in double.groups}
    limit = case.rule.limits.fp64
    for run in compared:
        error, worst = _distance(run.groups, wide)
        if error <= limit:
            yield Found("passed", f"distance {error:.2g} of at most {limit:g}", title(run))
        else:
            told = (
                f"the gradients differ from those in FP64 by {error:.2g} of their norm, more than "
                f"{limit:g}; most in {worst.name}, by {worst.error or 0.0:.2g} of its norm"
            )
            yield Found("finding", told, title(run), worst.name)


def _not_compared(double: Run | None) -> str:
    if double is None:
        return "fp64 is not among the variants"
    if double.raised is not None:
        return f"the FP64 replay raised {double.raised}"
    return "the replays in FP32 and FP64 are not both finite"


def _distance(groups: Iterable[Group], wide: Mapping[str, float]) -> tuple[float, Group]:
    """Relative distance over all groups, and the group that contributes most to it."""
    parts = [((group.error or 0.0) * wide.get(group.name, 0.0), group) for group in groups]
    # Where FP64 has no gradient at all, the distance is that of this group alone.
    lost = [group for _, group in parts if group.error == math.inf]
    if lost:
        return math.inf, lost[0]
    whole = math.hypot(*wide.values())
    worst = max(parts, key=lambda part: part[0])[1]
    return ratio_of(math.hypot(*(part for part, _ in parts)), whole) if whole else 0.0, worst
