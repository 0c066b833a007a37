"""`hunt`, and `investigate` for those who want the trace as well."""

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanhunt.errors import UsageError
from nanhunt.hunting.investigation import Investigation
from nanhunt.hunting.reproduction import Order, reproduced
from nanhunt.records import Report, Trace
from nanhunt.snapshot import preserved, remember
from nanhunt.subject import Subject
from nanhunt.trials import BUDGET
from nanhunt.variants import DEFAULT, NATIVE, variant


@dataclass(frozen=True, slots=True)
class Plan:
    """What an investigation is to do: the arguments of `hunt`, and what only the shell asks for.

    That is whether shapes are noted, whether each sample is replayed alone, where a script of the
    culprit is to be written, and how many seconds the trials of fixes may take (0: none are made).
    """

    batch: int = 0
    precisions: Sequence[str] = DEFAULT
    ablate: Sequence[str] = ()
    others: Iterable[Subject] = ()
    progress: Callable[[str], object] = lambda _: None
    shapes: bool = False
    steps: int = 1
    budget: float = BUDGET
    samples: bool = False
    repro: Order | None = None


def hunt(  # noqa: PLR0913 - one parameter for each choice, all by name
    subject: Any,
    *,
    batch: int = 0,
    precisions: Sequence[str] = DEFAULT,
    ablate: Sequence[str] = (),
    others: Iterable[Subject] = (),
    steps: int = 1,
    budget: float = BUDGET,
    progress: Callable[[str], object] = lambda _: None,
) -> Report:
    """Replay one step of a subject in several variants and report the first non-finite value.

    Args:
        subject: a `Subject`, a tuple `(model, batch, loss_fn)`, or any object of that shape.
        batch: index of the batch.
        precisions: names of variants; `native` is always run and alone decides the verdict.
        ablate: weights or terms to take out; `"all"` tries every one.
        others: the same subject from other initialisations, to see whether it fails there too.
        steps: how many real optimizer steps to take from that batch on; the hunt is for the first
            that fails, else for the last.
        budget: seconds that trials of fixes may take; 0 makes none.
        progress: called with a short text before each replay.

    Returns:
        The report. The subject is afterwards as it was before, to the bit.

    Raises:
        SubjectError: the step as given cannot be run.
        UsageError: a precision, weight or term that does not exist.
    """
    plan = Plan(batch, precisions, ablate, others, progress, steps=steps, budget=budget)
    return investigate(subject, plan)[0]


def investigate(subject: Any, plan: Plan) -> tuple[Report, Trace]:
    """Hunt as planned, and keep what the native replay recorded; errors as of `hunt`."""
    start = time.perf_counter()
    plan = _checked(plan)
    subject = Subject.of(subject)
    with preserved(subject) if plan.steps > 1 else contextlib.nullcontext():
        investigation = Investigation(subject, plan.batch, plan.progress, plan.shapes)
        restart = remember(subject) if plan.repro and plan.steps > 1 else _nothing
        investigation.start(plan.steps)
        _follow(investigation, plan)
        report = investigation.report(tuple(plan.precisions), tuple(plan.ablate))
        if plan.repro is not None:
            report = replace(report, repro=reproduced(investigation, plan.repro, restart))
    return replace(report, seconds=time.perf_counter() - start), investigation.trace


def _nothing() -> None:
    """One step begins where it ends: a replay puts everything back."""


def _checked(plan: Plan) -> Plan:
    """Refuse what is no number of steps, no batch or no list of names, each with one sentence.

    So is what is no subject among the others.
    """
    if not isinstance(plan.steps, int) or plan.steps < 1:
        raise UsageError(f"so many steps cannot be taken: {plan.steps!r}; at least 1")
    if not isinstance(plan.batch, int):
        raise UsageError(f"a batch is named by its index, a whole number; got {plan.batch!r}")
    if not isinstance(plan.others, Iterable):
        raise UsageError(
            f"others are subjects, as in [make(seed=1), make(seed=2)]; got {plan.others!r}"
        )
    others = map(Subject.of, plan.others)
    return replace(
        plan,
        # They may be made one by one, when their turn comes; those that are there are checked now.
        others=tuple(others) if isinstance(plan.others, Sequence) else others,
        precisions=_names("precisions", plan.precisions),
        ablate=_names("ablate", plan.ablate),
    )


def _names(what: str, given: Any) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else given
    if not isinstance(names, Iterable) or not all(isinstance(n, str) for n in (*names,)):
        raise UsageError(f"{what} are names, as in ['fp64']; got {given!r}")
    return tuple(names)


def _follow(investigation: Investigation, plan: Plan) -> None:
    """Everything that comes after the native replay."""
    chosen = [variant(name) for name in plan.precisions if name != NATIVE.name]
    investigation.check_names(plan.ablate)
    for each in chosen:
        investigation.run(each)
    investigation.ablate(plan.ablate, chosen)
    investigation.try_fixes(plan.budget)
    investigation.try_again(samples=plan.samples, others=plan.others)
