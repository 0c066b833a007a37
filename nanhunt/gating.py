"""What a gate measures: the step of each case in every variant, as plainly as it can be run.

A healthy step is not recorded: each variant is one step, measured at its ends. Only a step that
is not finite is hunted, so that the gate can name the line at fault.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nanhunt.errors import NanhuntError, UsageError
from nanhunt.gate import Gated, Policy
from nanhunt.hunting import Plan, investigate
from nanhunt.hunting.investigation import Investigation
from nanhunt.loading import load
from nanhunt.records import Report, Run
from nanhunt.replay import EMULATED, INITIAL_SCALE, Change, Replay, draw_batch, replay
from nanhunt.subject import Subject
from nanhunt.variants import NATIVE, Variant, variant

Progress: TypeAlias = Callable[[str], object]
Measured: TypeAlias = tuple[list[tuple[Gated, Report]], list[tuple[str, str]]]


def measure(policy: Policy, progress: Progress = lambda _: None) -> Measured:
    """Examine every case of a policy; those that cannot be run come with the sentence why.

    Raises:
        UsageError: a variant that does not exist.
    """
    for rule in policy.subjects:
        for name in rule.variants:
            _known_variant(policy, name)
    reports: list[tuple[Gated, Report]] = []
    broken: list[tuple[str, str]] = []
    for rule in policy.subjects:
        for batch, seed in ((b, s) for s in rule.seeds for b in rule.batches):
            case = rule.case(batch, seed)
            progress(case)
            try:
                built = load(rule.subject, options=rule.options, seed=seed, device=rule.device)
                report = examine(built.subject, rule, batch, progress)
            except NanhuntError as error:
                broken.append((case, str(error)))
            else:
                reports.append((rule, replace(report, subject=rule.subject, seed=seed)))
    return reports, broken


def _known_variant(policy: Policy, name: str) -> None:
    try:
        variant(name)
    except UsageError as error:
        raise UsageError(f"{policy.file.name}: variants: {error}") from None


def examine(
    subject: Any,
    rule: Gated,
    index: int = 0,
    progress: Progress = lambda _: None,
    *,
    is_repeated: bool = True,
) -> Report:
    """Replay one step in every variant of a rule; hunt only where it is not finite.

    The step as given is replayed twice where `is_repeated`, to see whether it comes out the same.

    Raises:
        SubjectError: the step as given cannot be run.
        UsageError: a weight or term to be taken out that does not exist.
    """
    subject = Subject.of(subject)
    batch = draw_batch(subject, index)
    done = list(_replays(subject, batch, rule, progress))
    native = done[0]
    known = Investigation(subject, index, progress, batch=batch, native=native)
    known.check_names(rule.ablations)
    done += [_ablated(subject, batch, name, progress) for name in rule.ablations]
    known.runs.extend(_with_errors(done, subject.parameter_groups()))
    if is_repeated:
        _compare_again(known, done)
    report = known.report(rule.variants, rule.ablations)
    return report if all(r.is_finite or r.raised for r in report.runs) else _hunted(report, known)


def _replays(subject: Subject, batch: Any, rule: Gated, progress: Progress) -> Iterator[Replay]:
    """The step as given, then in each variant."""
    others = [variant(name) for name in dict.fromkeys(rule.variants) if name != NATIVE.name]
    # The step as given stands for FP32 where no replay is made in it.
    is_compared = {each.name for each in others if each.precision is not None}
    if "fp64" in is_compared and "fp32" not in is_compared:
        is_compared.add(NATIVE.name)
    scale = INITIAL_SCALE
    for each in (NATIVE, *others):
        progress(each.name)
        is_watched = each == NATIVE or each.autocast is not None
        keeps = "fp64" in is_compared and each.name in is_compared
        is_digested = each.name in (NATIVE.name, "fp32")
        change = Change(gradients=keeps, halves=is_watched, digest=is_digested, fitting=scale)
        done = replay(subject, batch, each, scope=None, change=change)
        if each == NATIVE:
            scale = _likely_scale(done.run)
        yield done


def _likely_scale(native: Run) -> float:
    """The loss scale at which gradients of that size just fit FP16: where to start looking."""
    norm = math.hypot(*(group.norm for group in native.groups))
    if not math.isfinite(norm) or norm == 0.0:
        return INITIAL_SCALE
    return min(2.0 ** math.floor(math.log2(torch.finfo(torch.float16).max / norm)), INITIAL_SCALE)


def _compare_again(known: Investigation, done: list[Replay]) -> None:
    """Replay the step as given once more, where none of the replays was the same to the bit.

    Of a step that is in FP32 throughout, the replay in FP32 is such a one: it ran the same ops.
    """
    native, *others = done
    if native.fingerprint in {each.fingerprint for each in others if not each.variant.without}:
        known.deterministic = True
        return
    known.progress("native, again")
    # A step without products in FP16 needs no mode under it, which is half of a small one's time.
    lean = Change(emulated=EMULATED in native.run.notes)
    again = replay(known.subject, known.batch, NATIVE, scope=None, change=lean)
    known.deterministic = again.fingerprint == native.fingerprint
    if not known.deterministic and not lean.emulated:
        # The mode may be why: then both ways come out the same each time.
        leaner = replay(known.subject, known.batch, NATIVE, scope=None, change=lean)
        is_steady = leaner.fingerprint == again.fingerprint
        again = replay(known.subject, known.batch, NATIVE, scope=None)
        known.deterministic = is_steady and again.fingerprint == native.fingerprint
    if not known.deterministic:
        known.notes.append(
            f"two native replays differ (loss {native.run.loss:.9g} and {again.run.loss:.9g})"
        )


def _ablated(subject: Subject, batch: Any, name: str, progress: Progress) -> Replay:
    each: Variant = NATIVE.ablated(name)
    progress(f"without {name}")
    return replay(subject, batch, each, scope=None, change=Change(digest=False))


def _with_errors(done: list[Replay], members: Mapping[str, list[str]]) -> Iterator[Run]:
    """The runs; of those in FP32 each group with its distance from FP64."""
    wide = next((each for each in done if each.variant.name == "fp64"), None)
    for each in done:
        is_compared = wide is not None and each is not wide and each.gradients
        if wide is None or not is_compared or not (each.run.is_finite and wide.run.is_finite):
            yield each.run
            continue
        errors = _errors(each.gradients, wide.gradients, members)
        groups = tuple(replace(g, error=errors.get(g.name)) for g in each.run.groups)
        yield replace(each.run, groups=groups)


def _errors(
    narrow: Mapping[str, Tensor], wide: Mapping[str, Tensor], groups: Mapping[str, list[str]]
) -> dict[str, float]:
    """Distance of the gradients of each group, relative to their norm in FP64."""
    found = {}
    for group, names in groups.items():
        known = [name for name in names if name in narrow and name in wide]
        distance = math.hypot(*(_norm(narrow[name].to(wide[name]) - wide[name]) for name in known))
        whole = math.hypot(*(_norm(wide[name]) for name in known))
        found[group] = distance / whole if whole else (math.inf if distance else 0.0)
    return found


def _norm(tensor: Tensor) -> float:
    dense = tensor.coalesce().values() if tensor.is_sparse else tensor
    return float(torch.linalg.vector_norm(dense))


def _hunted(report: Report, known: Investigation) -> Report:
    """The report with what a hunt finds in the runs that were not finite."""
    failed = [run for run in report.runs if not run.is_finite and run.raised is None]
    precisions = tuple(r.variant for r in failed if not r.ablated and r.variant != NATIVE.name)
    ablated = tuple(name for run in failed for name in run.ablated)
    plan = Plan(known.index, precisions, ablated, progress=known.progress, budget=0.0)
    found, _ = investigate(known.subject, plan)
    named = {(run.variant, run.ablated): run for run in found.runs if run.culprit}
    runs = []
    for run in report.runs:
        seen = named.get((run.variant, run.ablated))
        if seen is not None and not run.is_finite:
            run = replace(  # noqa: PLW2901 - the same run, with its culprit
                run,
                culprit=seen.culprit,
                culprit_dtype=seen.culprit_dtype,
                culprit_line=seen.culprit_line,
            )
        runs.append(run)
    notes = tuple(dict.fromkeys((*report.notes, *found.notes)))
    return replace(found, runs=tuple(runs), deterministic=report.deterministic, notes=notes)
