"""The inquest into a failing step: it is replayed, the culprit named, told once and kept."""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from nanhunt import analysis
from nanhunt.errors import NanhuntError
from nanhunt.hunting import Plan, investigate
from nanhunt.places import told_finding
from nanhunt.processes import are_several
from nanhunt.recorder import Scope
from nanhunt.records import Finding, Report, Run, Verdict
from nanhunt.replay import Replay, draw_batch, replay
from nanhunt.structure import named_tensors
from nanhunt.subject import Subject, told
from nanhunt.variants import NATIVE, device_of
from nanhunt.versions import versions
from nanhunt.watching import doubts
from nanhunt.watching.choices import Choices
from nanhunt.watching.keeping import Keeping
from nanhunt.watching.scene import PastStep, Scene

_Key: TypeAlias = tuple[object, ...]
_KNOWN = 64  # so many distinct culprits are remembered
_SKIPPED = "the optimizer step: it was not taken"


@dataclass(frozen=True, slots=True)
class Case:
    """What came of an inquest; `is_overflow` says that a smaller loss scale makes it finite."""

    report: Report | None = None
    capsule: Path | None = None
    is_overflow: bool = False
    is_new: bool = False


@dataclass(slots=True)
class Inquest:
    """Holds the inquests of one watch and remembers who was found."""

    choices: Choices
    keeping: Keeping | None
    _cases: dict[_Key, Case] = field(default_factory=dict)
    _uses_batch: dict[Any, bool] = field(default_factory=dict)

    def hold(self, scene: Scene, *, seen: str, loss: float, fingerprint: str) -> Case:
        """Replay a step, from the state before it, and say who made it non-finite.

        Args:
            scene: the step.
            seen: what was not finite in training, one sentence.
            loss: of the step.
            fingerprint: of its loss and gradients; empty where that is not known.
        """
        with scene.as_it_was():
            try:
                with _hushed():
                    case, key = self._look(scene, seen)
            except Exception as error:  # noqa: BLE001 - the training goes on, whatever it was
                why = str(error) if isinstance(error, NanhuntError) else told(error)
                report = self.bare(scene.step, f"{seen}; it could not be replayed: {why}")
                notes = (*report.notes, *scene.doubts())
                case, key = Case(replace(report, notes=notes)), ("not replayed",)
            if case.report is None or key in self._cases:
                return self._cases.get(key, case)
            scene.put_back()
            return self._remembered(key, self._kept(case, scene, loss, fingerprint))

    def hold_on_past(self, past: PastStep, seen: str) -> Case | None:
        """Replay the optimizer step that was taken last; None where it leaves all finite."""
        try:
            with _hushed():
                report = self._hunted(past.subject(), past.previous.step or 0, ())
        except Exception:  # noqa: BLE001 - the step that failed is still to be looked at
            return None
        if report.verdict != "culprit":
            return None
        key = name_of(report.culprits[0])
        if key in self._cases:
            return self._cases[key]
        return self._remembered(key, Case(self._noted(report, seen)))

    def hold_together(self, scene: Scene, seen: str) -> Case:
        """Replay a step once, as all processes do at the same time, and say who made it so."""
        with scene.as_it_was(), _hushed():
            done = self._sketch(scene, scene.subject(whole=scene.call.takes_batch))
        found = analysis.find_culprits(done.trace) if done.trace else ()
        if not found:
            return Case(self._not_again(scene, done, seen) if done.run.is_finite else None)
        report = self.bare(scene.step, f"in training: {seen}")
        culprits = tuple(told_finding(finding) for finding in found)
        skipped = ("every other replay: the forward waits for other processes", _SKIPPED)
        verdict: Verdict = "culprit"
        return Case(
            replace(
                report, verdict=verdict, culprits=culprits, runs=(done.run,), not_checked=skipped
            )
        )

    def finite(self, step: int) -> Report:
        """The report of a process whose own part of the step is finite."""
        return replace(self.bare(step, "its own part is finite"), runs=(Run("native", loss=0.0),))

    def _remembered(self, key: _Key, case: Case) -> Case:
        while len(self._cases) >= _KNOWN:
            self._cases.pop(next(iter(self._cases)))
        self._cases[key] = case
        return replace(case, is_new=True)

    def _look(self, scene: Scene, seen: str) -> tuple[Case, _Key]:
        """One recorded replay; the whole hunt where it shows somebody new."""
        subject = scene.subject(whole=self._is_batch_used(scene))
        done = self._sketch(scene, subject)
        if done.run.is_finite and self._has_lowered(done):
            return Case(is_overflow=True), ()
        if done.run.is_finite:
            return Case(self._not_again(scene, done, seen)), ("did not reproduce",)
        suspects = analysis.find_suspects(done.trace) if done.trace else ()
        key = name_of(suspects[0].finding) if suspects else ("unexplained",)
        if key in self._cases:
            return self._cases[key], key
        report = self._hunted(subject, scene.step, self.choices.variants)
        return Case(self._noted(report, seen)), key

    def _sketch(self, scene: Scene, subject: Subject) -> Replay:
        batch = draw_batch(subject, scene.step)
        try:
            return replay(subject, batch, NATIVE, scope=Scope())
        finally:
            scene.put_back()

    def _has_lowered(self, done: Replay) -> bool:
        """Whether a replay had to lower the loss scale to be finite."""
        scaler = self.choices.live_scaler
        return scaler is not None and (done.run.scale or 1.0) < float(scaler.get_scale())

    def _is_batch_used(self, scene: Scene) -> bool:
        """Whether the closure computes with the tensors of `batch`, asked once of each closure."""
        call = scene.call
        if call.takes_batch or not any(True for _ in named_tensors(call.batch)):
            return call.takes_batch
        code = getattr(getattr(call.closure, "__func__", call.closure), "__code__", None)
        if code not in self._uses_batch:
            subject = scene.subject()
            batch = draw_batch(subject, scene.step)
            scene.asks = True
            try:
                replay(subject, batch, NATIVE, scope=None)
            finally:
                scene.asks = False
                scene.put_back()
            self._uses_batch[code] = scene.has_met_batch
        return self._uses_batch[code]

    def _hunted(self, subject: Subject, step: int, variants: tuple[str, ...]) -> Report:
        names = tuple(dict.fromkeys(("native", *variants)))
        budget = self.choices.budget
        if are_several():
            # A parameter that changes its dtype loses the hook by which its gradient is shared.
            names, budget = ("native",), 0.0
        plan = Plan(batch=step, precisions=names, budget=budget, progress=_silent)
        return investigate(replace(subject, batches=_any_index(subject)), plan)[0]

    def _noted(self, report: Report, seen: str) -> Report:
        left = [n for n in report.not_checked if not n.startswith(("the optimizer step", "other"))]
        if are_several():
            left = [n for n in left if not n.startswith("fixes")]
            left.append("fixes: not tried among several processes; replay the capsule alone")
        return replace(
            report,
            notes=(f"in training: {seen}", *report.notes),
            not_checked=(*left, _SKIPPED, "other initialisations"),
        )

    def _not_again(self, scene: Scene, done: Replay, seen: str) -> Report:
        """The report of a step whose replay is finite."""
        device = device_of(self.choices.model)
        events = done.trace.events if done.trace else ()
        report = self.bare(scene.step, f"did not reproduce: {seen}, and the replay is finite")
        why = [doubts.told(doubts.changeable_ops(events, device), device), *scene.doubts()]
        why.append("state outside the model and the random generators is not put back")
        return replace(report, runs=(done.run,), notes=(*report.notes, *why))

    def bare(self, step: int, headline: str) -> Report:
        """A report that names nobody."""
        return Report(
            self.choices.subject or type(self.choices.model).__name__,
            step,
            "unexplained",
            versions=versions(),
            device=device_of(self.choices.model),
            threads=torch.get_num_threads(),
            headline=headline,
            runs=(Run("native"),),
        )

    def _kept(self, case: Case, scene: Scene, loss: float, fingerprint: str) -> Case:
        if self.keeping is None or case.report is None:
            return case
        first = case.report.culprits[:1]
        place = f"{first[0].op} at {first[0].file}:{first[0].line}" if first else ""
        note = "; ".join(filter(None, [place, case.report.headline]))
        stored = self.keeping.keep(scene, loss=loss, fingerprint=fingerprint, note=note)
        return replace(case, capsule=stored)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Without warnings: the step has given its own already, and none may end an inquest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _any_index(subject: Subject) -> Any:
    """The one batch of a subject, at whichever index it is asked for."""
    batches = subject.batches
    return batches if callable(batches) else lambda _index: batches[0]


def _silent(_text: str) -> None:
    """A training has a progress bar of its own."""


def name_of(finding: Finding) -> _Key:
    """What makes a culprit the same one when it is met again."""
    return finding.phase, finding.op, finding.node, finding.file, finding.line, finding.where
