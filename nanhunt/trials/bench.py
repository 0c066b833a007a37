"""One trial: the step replayed with one thing changed, and what that shows."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nanhunt.recorder import Scope
from nanhunt.records import Run, Trial
from nanhunt.replay import Change, Replay, has_scaler, replay
from nanhunt.subject import Subject
from nanhunt.trials import agreement
from nanhunt.trials.trying import NO_PATCH, Patch, Trying
from nanhunt.variants import NATIVE, VARIANTS

# What a proof allows: rounding of the dtype in which the culprit ran, over a whole step.
_HALF = ("float16", "bfloat16")
_LOSS_TOLERANCE = {True: 1e-2, False: 1e-3}
_GRADIENT_TOLERANCE = {True: 0.1, False: 1e-2}

Applied: TypeAlias = Callable[[Subject], contextlib.AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One change that may make the step finite.

    A `patch` of calls, something that is `applied` to the subject around the step, a `scale` of the
    loss, or another `batch`.
    """

    recipe: str
    told: str
    patch: Patch = NO_PATCH
    applied: Applied | None = None
    scale: float | None = None
    batch: Any = None
    lines: tuple[str, str] | None = None
    sites: tuple[str, ...] = ()

    def on_top_of(self, base: "Candidate | None") -> "Candidate":
        """This change together with one that was made before."""
        if base is None:
            return self
        return replace(
            self,
            recipe=f"{base.recipe} + {self.recipe}",
            told=f"{base.told}; {self.told}",
            patch=base.patch.also(self.patch),
            sites=(*base.sites, *self.sites),
            applied=self.applied or base.applied,
            scale=self.scale or base.scale,
            batch=self.batch if self.batch is not None else base.batch,
            lines=self.lines if base.lines is None else None,
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """A trial, and what it left to look further into."""

    trial: Trial
    replay: Replay
    calls: Trying


@dataclass(slots=True)
class Bench:
    """Runs trials on one step; the subject is after each as it was before."""

    subject: Subject
    batch: Any
    native: Run
    dtype: str  # of the culprit
    ties: tuple[Patch, ...] = ()  # two ways to split the ties of a decomposition
    stable: Patch = NO_PATCH  # a stable form of the call, if one is known
    fails_in_fp64: bool = False  # as a replay has shown
    is_after_backward: bool = False  # what is changed comes after loss and gradients
    _reference: "Reference | None" = field(default=None, init=False)
    _native: Mapping[str, Tensor] | None = field(default=None, init=False)

    def try_out(self, candidate: Candidate, *, recorded: bool = False) -> Outcome:
        """Replay the step with a change and compare it with the step as given."""
        start = time.perf_counter()
        calls = Trying(candidate.patch)
        scale = candidate.scale or self._scale
        change = Change(_both(calls, candidate.applied), scale, gradients=True)
        batch = self.batch if candidate.batch is None else candidate.batch
        done = replay(
            self.subject, batch, NATIVE, scope=Scope() if recorded else None, change=change
        )
        is_whole = candidate.batch is None
        trial = self._judged(candidate, done, is_whole=is_whole)
        forms = [f"{site.name} → {form}" for site, form in calls.forms.items()]
        trial = replace(
            trial,
            change=", ".join([candidate.told, *forms]),
            times=calls.times,
            result_change=calls.result_change,
            seconds=time.perf_counter() - start,
        )
        return Outcome(trial, done, calls)

    @property
    def _scale(self) -> float | None:
        """The loss scale of every replay; None for that of the subject.

        Of a step of its own it is not known whether its gradients are divided by its scale, so that
        only those at one scale can be compared: at 1, where the step as given fails too.
        """
        is_own = self.subject.train_step is not None and has_scaler(self.subject)
        return 1.0 if is_own else None

    def _judged(self, candidate: Candidate, done: Replay, *, is_whole: bool) -> Trial:
        run, is_half = done.run, self.dtype in _HALF
        before, after = candidate.lines or (None, None)
        trial = Trial(
            candidate.recipe,
            candidate.told,
            finite=run.is_finite,
            sites=candidate.sites,
            before=before,
            after=after,
            loss=run.loss,
            gradient=math.hypot(*(group.norm for group in run.groups)),
            loss_tolerance=_LOSS_TOLERANCE[is_half],
            gradient_tolerance=_GRADIENT_TOLERANCE[is_half],
            raised=run.raised,
        )
        if not is_whole or self.is_after_backward:
            return trial
        trial = replace(trial, loss_change=agreement.loss_change(run, self.native))
        if not run.is_finite:
            return trial
        return self._compared(trial, done) or self._beside(trial, done)

    def _compared(self, trial: Trial, done: Replay) -> Trial | None:
        """The trial beside the reference; None where there is nothing to agree with."""
        reference = self._referred()
        if not reference.gradients:
            return None
        error = self._distance(done.gradients, reference.gradients)
        if reference.is_split and error > trial.gradient_tolerance and self._is_arbitrary():
            return None
        if trial.loss_change is None:
            trial = replace(trial, loss_change=agreement.relative(done.run.loss, reference.loss))
        return replace(trial, gradient_error=error, reference=reference.name)

    def _beside(self, trial: Trial, done: Replay) -> Trial:
        """The trial beside the step as given: what was finite of its gradients is to stay."""
        native = self._natively()
        vanished, revived = agreement.fates(done.gradients, native)
        trial = replace(trial, vanished=vanished, revived=revived)
        kept = agreement.survivors(native)
        # Behind a function out of its domain (log1p below -1) they are finite, and of no branch.
        is_astray = not math.isfinite(self.native.loss) and not self.native.nonfinite
        if not kept or is_astray:
            return trial
        given, expected = (agreement.of_survivors(g, kept) for g in (done.gradients, native))
        error = self._distance(given, expected)
        return replace(trial, gradient_error=error, reference="native, where finite")

    def _natively(self) -> Mapping[str, Tensor]:
        if self._native is None:
            change = Change(scale=self._scale, gradients=True)
            self._native = replay(
                self.subject, self.batch, NATIVE, scope=None, change=change
            ).gradients
        return self._native

    def _distance(self, gradients: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
        return agreement.distance(gradients, others, is_half=self.dtype in _HALF)

    def _referred(self) -> "Reference":
        """Finite gradients in FP64: of the step as given, with ties split, or in a stable form."""
        if self._reference is None:
            fails = self.fails_in_fp64
            self._reference = _NO_REFERENCE if fails else self._in_fp64("fp64", NO_PATCH)
            if not self._reference.gradients and self.ties:
                self._reference = self._in_fp64("fp64, ties split", self.ties[0])
            if not self._reference.gradients and self.stable is not NO_PATCH:
                self._reference = self._in_fp64("fp64, stable form", self.stable)
        return self._reference

    def _is_arbitrary(self) -> bool:
        """Whether it depends on how ties are split; there is no gradient to agree with then."""
        one, other = self._referred(), self._in_fp64("", self.ties[1])
        if self._distance(other.gradients, one.gradients) < _GRADIENT_TOLERANCE[False]:
            return False
        self._reference, self.ties = _NO_REFERENCE, ()
        return True

    def _in_fp64(self, name: str, patch: Patch) -> "Reference":
        calls = Trying(patch)
        change = Change(calls.entered, self._scale, gradients=True)
        done = replay(self.subject, self.batch, VARIANTS["fp64"], scope=None, change=change)
        is_met = patch is NO_PATCH or calls.times > 0
        if not is_met or not done.run.is_finite or not self._fits(done.gradients):
            return _NO_REFERENCE
        return Reference(name, done.gradients, done.run.loss, is_split=bool(patch.edits))

    def _fits(self, gradients: Mapping[str, Tensor]) -> bool:
        """Whether the parameters' own dtype could hold these gradients at all."""
        dtypes = {name: p.dtype for name, p in self.subject.model.named_parameters()}
        return all(bool(torch.isfinite(g.to(dtypes[name])).all()) for name, g in gradients.items())


@dataclass(frozen=True, slots=True)
class Reference:
    """Gradients to compare with."""

    name: str = ""
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    loss: float = math.nan
    is_split: bool = False


_NO_REFERENCE = Reference()


def _both(calls: Trying, applied: Applied | None) -> Applied:
    @contextlib.contextmanager
    def entered(subject: Subject) -> Iterator[None]:
        with calls.entered(subject), applied(subject) if applied else contextlib.nullcontext():
            yield

    return entered
