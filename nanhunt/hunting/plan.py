"""`hunt`, and `investigate` for those who want the trace as well."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanhunt.hunting.investigation import Investigation
from nanhunt.records import Report, Trace
from nanhunt.subject import Subject
from nanhunt.variants import DEFAULT, NATIVE, variant


@dataclass(frozen=True, slots=True)
class Plan:
    """What an investigation is to do: the arguments of `hunt`, and whether shapes are noted."""

    batch: int = 0
    precisions: Sequence[str] = DEFAULT
    ablate: Sequence[str] = ()
    others: Iterable[Subject] = ()
    progress: Callable[[str], object] = lambda _: None
    shapes: bool = False


def hunt(
    subject: Any,
    *,
    batch: int = 0,
    precisions: Sequence[str] = DEFAULT,
    ablate: Sequence[str] = (),
    others: Iterable[Subject] = (),
    progress: Callable[[str], object] = lambda _: None,
) -> Report:
    """Replay one step of a subject in several variants and report the first non-finite value.

    Args:
        subject: a `Subject`, a tuple `(model, batch, loss_fn)`, or any object of that shape.
        batch: index of the batch.
        precisions: names of variants; `native` is always run and alone decides the verdict.
        ablate: weights or terms to take out; `"all"` tries every one.
        others: the same subject from other initialisations, to see whether it fails there too.
        progress: called with a short text before each replay.

    Returns:
        The report. The subject is afterwards as it was before, to the bit.

    Raises:
        SubjectError: the step as given cannot be run.
        UsageError: a precision, weight or term that does not exist.
    """
    plan = Plan(batch, precisions, ablate, others, progress)
    return investigate(subject, plan)[0]


def investigate(subject: Any, plan: Plan) -> tuple[Report, Trace]:
    """Hunt as planned, and keep what the native replay recorded; errors as of `hunt`."""
    start = time.perf_counter()
    chosen = [variant(name) for name in plan.precisions if name != NATIVE.name]
    investigation = Investigation(Subject.of(subject), plan.batch, plan.progress, plan.shapes)
    investigation.start()
    investigation.check_names(plan.ablate)
    for each in chosen:
        investigation.run(each)
    investigation.ablate(plan.ablate, chosen)
    investigation.try_sizes()
    investigation.try_others(plan.others)
    report = investigation.report(tuple(plan.precisions), tuple(plan.ablate))
    return replace(report, seconds=time.perf_counter() - start), investigation.trace
