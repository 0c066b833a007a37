"""What is tried against a culprit, in which order, and when enough was tried."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nanhunt import analysis
from nanhunt.causes import base_name
from nanhunt.places import readable_path
from nanhunt.records import Finding, Run, Trial
from nanhunt.structure import count_samples
from nanhunt.subject import Subject
from nanhunt.trials.bench import Bench, Candidate, Outcome
from nanhunt.trials.calls import Site
from nanhunt.trials.edits import Edit, edits_of
from nanhunt.trials.lines import rewritten
from nanhunt.trials.trying import Patch
from nanhunt.trials.wholes import of_step

BUDGET = 30.0  # seconds
_MOST_SITES = 3  # a cure may need that many lines to be changed
_WIDEST = 2  # of the changes that failed, so many are gone on with

# What a change of last resort does: it always helps, and hides more than it mends.
_LAST = ("double_where", "finite_constant", "upcast", "saturate")
# Beliefs about a cause that are worth refuting: they are tried even after a cure was found.
_TRIED_ANYWAY = ("more_loading", "svd_instead_of_eigh")
# The causes in which an infinity stands that the program asked for.
_INFINITY_ASKED = (
    "inf_minus_inf_or_zero_times_inf",
    "masked_branch_backward",
    "fully_masked_reduction",
)
_DECOMPOSITIONS = ("linalg_eigh", "linalg_svd", "svd", "symeig")


@dataclass(slots=True)
class Search:
    """The trials on the culprits of one step, within a budget."""

    subject: Subject
    batch: Any
    native: Run
    progress: Callable[[str], object]
    until: float
    fails_in_fp64: bool
    trials: list[Trial] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def run(self, lead: "Lead") -> None:
        """Try changes against a culprit until one is proven."""
        dtype, fails = lead.finding.dtype, self.fails_in_fp64
        bench = Bench(self.subject, self.batch, self.native, dtype, fails_in_fp64=fails)
        bench.is_after_backward = lead.finding.phase == "optimizer"
        self._descend(bench, lead, None)

    def _descend(self, bench: Bench, lead: "Lead", base: Candidate | None, depth: int = 1) -> bool:
        """Try everything against a culprit; go on with what is left where nothing helps."""
        if base_name(lead.finding.op) in _DECOMPOSITIONS and lead.sites:
            texts = (f"split({{x}}, {seed})" for seed in (0, 1))
            bench.ties = tuple(Patch({lead.sites[0]: Edit("", "x", t)}) for t in texts)
        if lead.sites and base is None:
            bench.stable = Patch({}, lead.sites[0])
        failed: list[Candidate] = []
        is_cured = False
        for candidate in self._candidates(lead):
            if is_cured and candidate.recipe not in _TRIED_ANYWAY:
                continue
            if time.perf_counter() > self.until:
                self.left_out.append(candidate.told)
                continue
            whole = candidate.on_top_of(base)
            self.progress(f"trial: {candidate.recipe}")
            outcome = bench.try_out(whole)
            if _did_nothing(outcome, candidate):
                continue
            self.trials.append(outcome.trial)
            is_cured |= outcome.trial.is_proven
            if not outcome.trial.finite and outcome.trial.raised is None:
                failed.append(whole)
        if is_cured or depth == _MOST_SITES:
            return is_cured
        return self._go_on(bench, lead, failed[:_WIDEST], depth)

    def _go_on(self, bench: Bench, lead: "Lead", failed: Sequence[Candidate], depth: int) -> bool:
        """Look for what is left behind a change that did not suffice, and change that too."""
        for candidate in failed:
            if time.perf_counter() > self.until:
                return False
            again = bench.try_out(candidate, recorded=True)
            found = _lead_of(again, count_samples(self.batch))
            if found is None or _place(found.finding) == _place(lead.finding):
                continue
            self.trials = [_with_rest(t, again.trial, found.finding) for t in self.trials]
            if self._descend(bench, found, candidate, depth + 1):
                return True
        return False

    def _candidates(self, lead: "Lead") -> Iterator[Candidate]:
        """Changes that are known for the cause first, then the others that the call has."""
        finding = lead.finding
        found = [*of_step(finding, self.subject, self.batch)]
        # The form of what fails, or of what made its operand: a difference that cancels, say.
        for site in (*lead.sites[:1], *lead.upstream[:_WIDEST]):
            told = "computed by a stable form"
            found.append(_at(site, Candidate("stable_formulation", told, Patch({}, site))))
        for site in lead.sites:
            edits = edits_of(site.name, finding.dtype)
            found += [_edited(site, edit) for edit in edits if _may_help(edit, finding)]
        for site in lead.upstream:
            edits = edits_of(site.name, finding.dtype)
            found += [_edited(site, edit) for edit in edits if edit.recipe == "upcast"]
        order = {recipe: rank for rank, recipe in enumerate(finding.recipes)}
        rest = len(order)
        seen: set[object] = set()
        for candidate in sorted(
            found, key=lambda c: order.get(c.recipe, rest + (c.recipe in _LAST))
        ):
            made = (candidate.told, candidate.patch.avoided, *candidate.patch.edits)
            if made not in seen:
                seen.add(made)
                yield candidate


@dataclass(frozen=True, slots=True)
class Lead:
    """A culprit and the calls it was part of, the innermost first.

    `upstream` are the calls that made its operands what they were, the nearest first.
    """

    finding: Finding
    sites: tuple[Site, ...] = ()
    upstream: tuple[Site, ...] = ()


def _lead_of(outcome: Outcome, samples: int | None) -> Lead | None:
    """The culprit that a recorded trial shows."""
    trace = outcome.replay.trace
    suspects = analysis.find_suspects(trace, samples=samples) if trace else ()
    if not suspects:
        return None
    event = suspects[0].call
    sites = outcome.calls.around(event) if event is not None else ()
    return Lead(suspects[0].finding, sites)


def _may_help(edit: Edit, finding: Finding) -> bool:
    """Whether an edit is no mere repair: an infinity that arithmetic made is not to be dropped."""
    is_asked = finding.cause in _INFINITY_ASKED
    return edit.recipe != "finite_constant" or is_asked


def _place(finding: Finding) -> tuple[object, ...]:
    file = readable_path(finding.file) if finding.file else None
    return finding.phase, finding.op, file, finding.line


def _edited(site: Site, edit: Edit) -> Candidate:
    told = f"{site.name}: {edit.target} → " + edit.text.format(
        x="x", y="y", call="call", f=site.name
    )
    if edit.target == "keyword":
        told = f"{site.name}: {edit.text}"
    lines = rewritten(site, edit)
    return _at(site, Candidate(edit.recipe, told, Patch({site: edit}), lines=lines))


def _at(site: Site, candidate: Candidate) -> Candidate:
    code, offset = site.line
    line = next((p[0] for i, p in enumerate(code.co_positions()) if i == offset // 2), None)
    return replace(candidate, sites=(f"{readable_path(code.co_filename)}:{line}",))


def _did_nothing(outcome: Outcome, candidate: Candidate) -> bool:
    """Whether a change of calls met none, so that there is nothing to tell."""
    is_patch = bool(candidate.patch.edits) or candidate.patch.avoided is not None
    return is_patch and not outcome.calls.times


def _with_rest(trial: Trial, again: Trial, found: Finding) -> Trial:
    """Say of a change that failed what made the next non-finite value."""
    if trial.finite or (trial.change, trial.sites) != (again.change, again.sites):
        return trial
    file = readable_path(found.file) if found.file else None
    return replace(trial, culprit_after=f"{found.op} at {file}:{found.line}" if file else found.op)


def try_fixes(
    lead: Lead,
    subject: Subject,
    batch: Any,
    runs: Sequence[Run],
    progress: Callable[[str], object],
    budget: float = BUDGET,
) -> tuple[tuple[Trial, ...], tuple[str, ...]]:
    """Try changes against a culprit; return the trials, and what there was no time for.

    Of `runs`, the replays so far, the first is that of the step as given.
    """
    fails = any(r.variant == "fp64" and not r.ablated and not r.is_finite for r in runs)
    search = Search(subject, batch, runs[0], progress, time.perf_counter() + budget, fails)
    search.run(lead)
    return tuple(search.trials), tuple(search.left_out)
