"""An investigation: what is known so far, replay by replay, and the report at its end."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from nanhunt import analysis
from nanhunt.errors import UsageError
from nanhunt.hunting.again import tell_samples, try_sizes
from nanhunt.hunting.detective import Detective, settle
from nanhunt.hunting.terms import accused_terms, smallest_cure
from nanhunt.recorder import Scope
from nanhunt.records import (
    Ablation,
    Answer,
    Finding,
    Pace,
    Report,
    Run,
    Sample,
    Trace,
    Trial,
    Verdict,
)
from nanhunt.replay import Replay, draw_batch, replay, take_steps
from nanhunt.structure import count_samples
from nanhunt.subject import Subject, told
from nanhunt.trials import Lead, try_fixes
from nanhunt.variants import DEFAULT, NATIVE, Variant, device_of
from nanhunt.versions import versions

ALL = "all"


@dataclass(slots=True)
class Investigation:
    """What is known so far, replay by replay."""

    subject: Subject
    index: int
    progress: Callable[[str], object]
    shapes: bool = False
    batch: Any = None
    native: Replay | None = None
    culprits: tuple[Finding, ...] = ()
    deterministic: bool | None = None
    runs: list[Run] = field(default_factory=list)
    ablations: list[Ablation] = field(default_factory=list)
    sizes: list[Sample] = field(default_factory=list)
    seeds: list[Sample] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    lead: Lead | None = None
    untried: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    steps: int = 1
    pace: tuple[Pace, ...] = ()

    def start(self, steps: int = 1) -> None:
        """Replay natively, after the steps before if there are any, and again unrecorded."""
        if steps > 1:
            self._take_steps(steps)
        else:
            self._make_batch()
        self.native = self.run(NATIVE) if self.native is None else self._named(self.native)
        self.progress("native, again")
        first, again = self.native, replay(self.subject, self.batch, NATIVE, scope=None)
        if again.run.scale != first.run.scale:
            # A course met the failure at the scale that its scaler had then, a replay at the least.
            first = replay(self.subject, self.batch, NATIVE, scope=None)
        self.deterministic = again.fingerprint == first.fingerprint
        if not self.deterministic:
            self.notes.append(
                f"two native replays differ (loss {self.native.run.loss:.9g} and "
                f"{again.run.loss:.9g}): what follows may not come again"
            )
        detective = Detective(
            self.subject, self.batch, self.native, self.deterministic, self.pace, self.progress
        )
        self.culprits = detective.findings()
        self.notes.extend(detective.notes)
        self.trials.extend(detective.trials)
        self.lead = detective.lead

    def _make_batch(self) -> None:
        self.progress("batch")
        self.batch = draw_batch(self.subject, self.index)

    def _take_steps(self, steps: int) -> None:
        course = take_steps(self.subject, self.index, steps, self.progress)
        self.subject, self.index = course.subject, course.subject.step
        self.batch, self.pace, self.native = course.batch, course.pace, course.replay
        self.steps = steps
        subject = self.subject
        is_lbfgs = isinstance(subject.optimizer, torch.optim.LBFGS)
        if subject.train_step is None and (subject.optimizer is None or is_lbfgs):
            what = "needs a closure" if is_lbfgs else "is missing"
            self.notes.append(
                f"no step changed a parameter: the optimizer {what}; give a train_step"
            )

    def run(self, each: Variant, *, listed: bool = True) -> Replay:
        """Replay one variant and name its culprit."""
        self.progress(_title(each))
        # What each module did is told of every precision; without a term it only costs.
        is_whole = not each.without
        scope = Scope(modules=is_whole, shapes=self.shapes and each == NATIVE)
        return self._named(replay(self.subject, self.batch, each, scope=scope), listed=listed)

    def _named(self, done: Replay, *, listed: bool = True) -> Replay:
        """Name the culprit of a replay."""
        samples = count_samples(self.batch)
        found = analysis.find_culprits(done.trace, samples=samples) if done.trace else ()
        if found:
            first = settle(found[0], done.run)
            line = f"{first.file}:{first.line}" if first.file else None
            done = replace(
                done,
                run=replace(
                    done.run, culprit=first.op, culprit_dtype=first.dtype, culprit_line=line
                ),
            )
        if done.trace is not None and done.variant != NATIVE and not done.variant.without:
            facts = analysis.summarise_modules(done.trace)
            done = replace(done, run=replace(done.run, modules=facts))
        if listed:
            self.runs.append(done.run)
        return done

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse names that are neither a weight nor a term.

        Raises:
            UsageError: such a name; the sentence lists the known ones.
        """
        known = self.known_names()
        for name in names:
            if name == ALL and known:
                continue
            if name not in known:
                raise UsageError(
                    f"nothing to ablate is called {name!r}; "
                    + (
                        f"known weights and terms: {', '.join(known)}"
                        if known
                        else "the loss is one scalar without named terms, and the subject "
                        "gives no weights"
                    )
                )

    def known_names(self) -> list[str]:
        """Weights that can be set, then the terms of the loss."""
        weights = self.subject.live_weights() if self.subject.reweight is not None else {}
        terms = [term.name for term in self._native.run.terms]
        return list(dict.fromkeys((*weights, *terms)))

    @property
    def trace(self) -> Trace:
        """What the native replay recorded."""
        return self._native.trace or Trace((), ())

    @property
    def _native(self) -> Replay:
        if self.native is None:
            raise RuntimeError("the native replay comes first")
        return self.native

    # -- ablations ---------------------------------------------------------------------------

    def ablate(self, names: Sequence[str], chosen: Sequence[Variant]) -> None:
        """Take out what was asked for, in every variant; search on if that does not cure."""
        wanted = [name for name in dict.fromkeys(names) if name != ALL]
        for name in wanted:
            self._without(name, requested=True, listed=len(wanted) == 1)
        if wanted:
            for each in [NATIVE, *chosen] if len(wanted) > 1 else chosen:
                self.run(each.ablated(*wanted))
        failed = not self._native.run.is_finite
        cured = any(a.cures for a in self.ablations if a.requested)
        if ALL in names or (failed and not cured and len(self._native.run.terms) > 1):
            self._search(wanted, everything=ALL in names)

    def _without(self, name: str, *, requested: bool, listed: bool = False) -> Ablation:
        done = self.run(NATIVE.ablated(name), listed=listed)
        weights = (self._native.weights, done.weights)
        judged = analysis.judge_ablation(name, self._native.run, done.run, weights)
        self.ablations.append(replace(judged, requested=requested))
        return self.ablations[-1]

    def _alone(self, term: str, *, requested: bool) -> None:
        self.progress(f"{term} alone")
        done = replay(self.subject, self.batch, NATIVE.only(term), scope=None).run
        self.ablations.append(
            Ablation(
                names=(term,),
                mode="alone",
                requested=requested,
                finite=done.is_finite,
                loss=done.loss,
                groups=done.groups,
                raised=done.raised,
            )
        )

    def _search(self, wanted: Sequence[str], *, everything: bool) -> None:
        """Find what cures: rank terms by one backward each, confirm each claim by a replay."""
        suspects = list(dict.fromkeys((*self._terms_of_culprits(), *self._accused_terms())))
        tried = {a.names[0] for a in self.ablations if a.mode == "without"}
        for term in suspects if not everything else [t.name for t in self._native.run.terms]:
            name = self._handle(term)
            if name not in tried:
                self._without(name, requested=everything)
        cleared = [t for t in map(self._term_of, wanted) if t is not None]
        for term in dict.fromkeys((*cleared, *suspects)):
            self._alone(term, requested=False)
        if not suspects and not everything:
            self.notes.append("every term alone has a finite backward: the terms fail together")
        if not self._native.run.is_finite and not any(a.cures for a in self.ablations):
            self._take_out_together(suspects)

    def _take_out_together(self, suspects: Sequence[str]) -> None:
        """Where no term cures alone, replay without a smallest set that does."""
        sizes = {t.name: abs(t.value) for t in self._native.run.terms}
        ranked = sorted(sizes, key=lambda t: (t not in suspects, -sizes[t]))
        found: list[Ablation] = []

        def cures(names: Sequence[str]) -> bool:
            self.progress(f"without {', '.join(names)}")
            run = replay(self.subject, self.batch, NATIVE.ablated(*names), scope=None).run
            if run.is_finite:
                done = Ablation((*names,), "without", requested=False, finite=True, loss=run.loss)
                found.append(replace(done, groups=run.groups))
            return run.is_finite

        smallest_cure([self._handle(term) for term in ranked], cures)
        self.ablations.extend(found[-1:])

    def _accused_terms(self) -> list[str]:
        """The terms whose own backward is not finite at the first poisoned parameters."""
        self.progress("one backward per term")
        try:
            return accused_terms(self.subject, self.batch, self.trace)
        except Exception as error:  # noqa: BLE001 - a graph that cannot be kept ends no hunt
            self.notes.append(f"terms could not be ranked: {told(error)}")
            return []

    def _terms_of_culprits(self) -> list[str]:
        """The terms that own a culprit by themselves; a shared node accuses nobody."""
        return [f.terms[0] for f in self.culprits if len(f.terms) == 1]

    def _handle(self, term: str) -> str:
        """The weight by which a term is set, if its name shows one; else the term itself."""
        weights = self.subject.live_weights() if self.subject.reweight is not None else {}
        named = [w for w in weights if w == term or w.partition("_")[2] == term]
        return named[0] if len(named) == 1 else term

    def _term_of(self, name: str) -> str | None:
        terms = [term.name for term in self._native.run.terms]
        return next((t for t in terms if t == name or self._handle(t) == name), None)

    # -- trials ------------------------------------------------------------------------------

    def try_fixes(self, budget: float) -> None:
        """Change one thing at a time at each culprit and see whether the failure goes away."""
        if not self.culprits or self.deterministic is False:
            return
        if not budget:
            self.untried.append("all")
            return
        lead = self.lead or Lead(self.culprits[0])
        trials, left_out = try_fixes(
            lead, self.subject, self.batch, self.runs, self.progress, budget
        )
        self.trials.extend(trials)
        self.untried.extend(left_out)

    # -- does it come again ------------------------------------------------------------------

    def try_again(self, *, samples: bool, others: Iterable[Subject]) -> None:
        """Replay a failing step with fewer samples, each alone if asked to, and other seeds."""
        if not self._native.run.is_finite and count_samples(self.batch) is not None:
            sizes, note = try_sizes(self.subject, self.batch, self.progress)
            self.sizes.extend(sizes)
            self.notes.extend([note] if note else [])
            if samples:
                self.notes.append(tell_samples(self.subject, self.batch, self.progress))
        for other in others:
            self.progress(f"seed {other.seed}")
            run = replay(other, self.batch, NATIVE, scope=None).run
            self.seeds.append(Sample(other.seed, run.is_finite))

    # -- the report --------------------------------------------------------------------------

    def report(self, precisions: Sequence[str], ablate: Sequence[str]) -> Report:
        """Everything that was found, for a renderer."""
        weights = self.subject.live_weights()
        interest = [n for n in ablate if n != ALL]
        interest += [self._handle(t) for t in self._terms_of_culprits()]
        interest += [name for a in self.ablations if a.cures for name in a.names]
        trace = self._native.trace
        if (
            trace is not None
            and self.culprits
            and "decomposition" in (self.culprits[0].cause or "")
        ):
            self.notes.extend(analysis.vector_use(trace))
        self._note_silent_terms()
        twins = analysis.confusable_names(list(weights), interest)
        return Report(
            subject=self.subject.name or type(self.subject.model).__name__,
            batch=self.index,
            verdict=self._verdict(),
            samples=count_samples(self.batch),
            versions=versions(),
            device=device_of(self.subject.model),
            threads=torch.get_num_threads(),
            headline=analysis.describe_nonfinite(self._native.run),
            culprits=self.culprits,
            runs=tuple(self.runs),
            ablations=tuple(self.ablations),
            trials=tuple(self.trials),
            precision=analysis.judge_precision(self.runs),
            diagnosis=self._diagnosis(twins),
            modules=analysis.summarise_modules(self.trace),
            twins=twins,
            weights=tuple(weights.items()),
            configured=tuple(self.subject.configured.items()),
            seed=self.subject.seed,
            deterministic=self.deterministic,
            steps=self.steps,
            pace=self.pace,
            harmless=analysis.tell_harmless(self.trace),
            notes=tuple(dict.fromkeys(self.notes)),
            not_checked=tuple(self._unchecked(precisions)),
        )

    def _diagnosis(self, twins: tuple[tuple[str, str], ...]) -> tuple[Answer, ...]:
        trace = self._native.trace
        if trace is None:
            return ()
        case = analysis.Case(
            run=self._native.run,
            trace=trace,
            runs=tuple(self.runs),
            ablations=tuple(self.ablations),
            weights=self.subject.live_weights(),
            configured=self.subject.configured,
            twins=twins,
            deterministic=self.deterministic,
            sizes=tuple(self.sizes),
            seeds=tuple(self.seeds),
        )
        return analysis.diagnose(case)

    def _verdict(self) -> Verdict:
        if not self._native.run.is_finite:
            return "culprit" if self.culprits else "unexplained"
        at_risk = any(
            not run.is_finite and run.raised is None for run in self.runs if not run.ablated
        )
        return "at_risk" if at_risk else "healthy"

    def _note_silent_terms(self) -> None:
        for term in self._native.run.terms:
            if term.value == 0.0 and not term.has_graph:
                self.notes.append(f"term {term.name} is exactly 0 and has no graph")
        missing = sum(group.without_gradient for group in self._native.run.groups)
        if missing:
            self.notes.append(f"{missing} trainable parameters get no gradient from this loss")

    def _unchecked(self, precisions: Sequence[str]) -> Iterable[str]:
        if device_of(self.subject.model) == "cpu":
            yield "CUDA"
        if self.untried:
            yield f"fixes: {_told_untried(self.untried)}"
        yield "other batches (--batch N) and other initialisations"
        if any(type(m).__name__ == "OptimizedModule" for m in self.subject.model.modules()):
            yield "compiled code: it was replayed eagerly"
        left = [name for name in DEFAULT if name not in precisions and name != NATIVE.name]
        if left:
            yield f"precisions {', '.join(left)}"
        if self.subject.optimizer is None:
            yield "the optimizer step: the subject has no optimizer"
        elif not self._native.run.is_finite and not self._native.run.stepped_nonfinite:
            yield "the optimizer step: it comes after a finite backward only"


def _told_untried(changes: Sequence[str]) -> str:
    if [*changes] == ["all"]:
        return "none was tried (--quick)"
    return f"{len(changes)} more, for which there was no time"


def _title(each: Variant) -> str:
    return f"{each.name}{' without ' + ', '.join(each.without) if each.without else ''}"
