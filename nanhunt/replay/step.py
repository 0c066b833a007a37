"""One subject, one variant: the step is run once and everything is put back."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nanhunt.errors import NanhuntError, SubjectError
from nanhunt.generators import seed_generators
from nanhunt.recorder import Captured, Deferred, Kept, LossHalves, Recorder, Scope
from nanhunt.records import Run, Trace
from nanhunt.replay.drive import Drive, has_scaler, set_scale
from nanhunt.replay.ends import is_finite
from nanhunt.replay.objective import read_objective
from nanhunt.snapshot import keep_generators, preserved
from nanhunt.subject import Subject, told
from nanhunt.variants import NATIVE, Variant, beneath, cast_batch

# GradScaler starts here and halves on overflow; below 1 a scale is no remedy any more.
INITIAL_SCALE = 65536.0
PLAIN = Scope()
_NOT_RECORDED = contextlib.nullcontext()


def _nothing(_subject: Subject) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext()


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that is done otherwise than in the step as given.

    `applied` is entered around the step, with all that it does to the subject put back afterwards.
    The loss is multiplied by `scale` before the backward and the gradients are divided by it again.
    With `gradients` they are kept, and with `halves` the ops of the loss are watched for half
    precision; neither changes anything. Without `digest` there is no fingerprint. With
    `fitting` the search for a loss scale starts there and ends at the first that fits, where else
    the largest one from `INITIAL_SCALE` down is sought. Without `emulated` FP16 products on a CPU
    are left to torch, which is right for a step that has none.
    """

    applied: Callable[[Subject], contextlib.AbstractContextManager[object]] = _nothing
    scale: float | None = None
    gradients: bool = False
    halves: bool = False
    digest: bool = True
    fitting: float | None = None
    emulated: bool = True

    @property
    def is_none(self) -> bool:
        """Whether the step runs as given, and is only looked at more closely."""
        return self.applied is _nothing and self.scale is None


UNCHANGED = Change()


def draw_batch(subject: Subject, index: int) -> Any:
    """A copy of the batch at an index, drawn under the subject's seed."""
    restore = keep_generators()
    try:
        seed_generators(subject.seed)
        return cast_batch(NATIVE, subject.batch(index))
    finally:
        restore()


@dataclass(frozen=True, slots=True)
class Replay:
    """What one replay gave: its line in the report, its trace if recorded, and its bits.

    `fingerprint` digests loss and gradients bit by bit; two replays of a deterministic step agree.
    `unscaled` does so with the gradients divided by the scale of the loss, where both were asked
    for and there is one.
    `weights` are those that the live objective held while the step ran, `kept` the tensors of
    a replay that was to keep them, `gradients` those of the parameters by name, and `captured` the
    operands of the ops that it was to capture.
    """

    variant: Variant
    run: Run
    trace: Trace | None = None
    fingerprint: str = ""
    weights: Mapping[str, float] = field(default_factory=dict)
    kept: Kept | None = None
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    captured: Captured | None = None
    unscaled: str = ""


def replay(
    subject: Subject,
    batch: Any,
    variant: Variant = NATIVE,
    *,
    scope: Scope | None = PLAIN,
    change: Change = UNCHANGED,
    capture: frozenset[int] = frozenset(),
) -> Replay:
    """Run the step of a subject once and put everything back.

    Args:
        subject: what is examined; parameters, buffers, gradients, optimizer, scaler, random
            generators, module modes and torch's switches are as before afterwards.
        batch: the batch; it is copied, never written to.
        variant: how the step differs from the one given.
        scope: what the recorder is to do; without one only loss and gradients are measured.
        change: what is done otherwise; a step that raises under one is a `Run` with `raised`.
        capture: indices of the events whose operands are to be copied before they run.

    Returns:
        The replay. One that raises under a variant is a `Run` with `raised`.

    Raises:
        SubjectError: the step as given cannot be run, or its loss is not what a loss must be.
        UsageError: the variant names a term or weight that does not exist.
    """
    start = time.perf_counter()
    scale = change.scale or _first_scale(subject, variant)
    if variant.scaled and change.fitting is not None:
        scale = max(min(scale, change.fitting), 1.0)
    # Under a scale, recording waits until the scale is known at which there is something to see.
    attempt = _Attempt(subject, batch, variant, change, capture)
    done = attempt(scope if scale <= 1.0 else None, scale)
    if scale > 1.0 and done.run.raised is None and not done.run.is_finite:
        done = _fit_scale(attempt, scope, failed=done)
    if scope and done.trace is None and done.run.raised is None and variant.name == NATIVE.name:
        # The native trace also counts the ops of each term, so it is wanted of a finite step too.
        recorded = attempt(scope, done.run.scale or 1.0)
        notes = tuple(dict.fromkeys((*recorded.run.notes, *done.run.notes)))
        done = replace(recorded, run=replace(recorded.run, notes=notes))
    return replace(done, run=replace(done.run, seconds=time.perf_counter() - start))


def find_fingerprints(subject: Subject, batch: Any) -> frozenset[str]:
    """Digests of loss and gradients of the step exactly as given, at the scale that its scaler has.

    One is of the gradients as the backward leaves them, the other of those that the scaler has
    divided by its scale: it depends on the loop when it looked at them. Errors as of `replay`.
    """
    change = Change(gradients=True)
    done = _Attempt(subject, batch, NATIVE, change)(None, _first_scale(subject, NATIVE))
    return frozenset(filter(None, (done.fingerprint, done.unscaled)))


def _first_scale(subject: Subject, variant: Variant) -> float:
    is_scaled = has_scaler(subject)
    if variant.scaled:
        # A step of its own is scaled by its own scaler or not at all.
        return INITIAL_SCALE if is_scaled or subject.train_step is None else 1.0
    if is_scaled:
        return float(subject.scaler.get_scale())
    return 1.0


def _fit_scale(attempt: "_Attempt", scope: Scope | None, *, failed: Replay) -> Replay:
    """Halve the scale as GradScaler would; a step that no scale from 1 up makes finite has failed.

    The search assumes that what overflows at one scale overflows at every larger one.
    """
    if attempt.change.fitting is not None:
        for scale in _descending(failed.run.scale or 1.0):
            tried = attempt(None, scale)
            if tried.run.is_finite:
                note = f"gradients overflow at loss scale {failed.run.scale:g}; {scale:g} fits"
                return replace(tried, run=replace(tried.run, notes=(*tried.run.notes, note)))
    lowest = attempt(scope, 1.0)
    if not lowest.run.is_finite:
        note = f"non-finite at loss scale {failed.run.scale:g} and still at 1"
        return replace(lowest, run=replace(lowest.run, notes=(*lowest.run.notes, note)))
    fits, fails = 0, math.ceil(math.log2(failed.run.scale or 1.0))
    best = lowest
    while fails - fits > 1:
        middle = (fits + fails) // 2
        tried = attempt(None, 2.0**middle)
        if tried.run.is_finite:
            fits, best = middle, tried
        else:
            fails = middle
    note = f"gradients overflow at loss scale {failed.run.scale:g}; {2.0**fits:g} fits"
    return replace(best, run=replace(best.run, notes=(*best.run.notes, note)))


def _descending(scale: float) -> Iterator[float]:
    """Smaller scales above 1, in steps that grow: what a scaler skips to is mostly near."""
    factor = 4.0
    while scale / factor > 1.0:
        scale, factor = scale / factor, factor * factor
        yield scale


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One step of one variant at one loss scale; everything is put back."""

    subject: Subject
    batch: Any
    variant: Variant
    change: Change
    capture: frozenset[int] = frozenset()

    def __call__(self, scope: Scope | None, scale: float) -> Replay:
        """Take the step; again, if what a device had made was wrongly taken to be finite."""
        deferred = Deferred() if scope and self._may_wait(scope) else None
        done = self._take(scope, scale, deferred)
        if deferred is None or deferred.holds():
            return done
        del done  # its trace
        return self._take(scope, scale, None)

    def _may_wait(self, scope: Scope) -> bool:
        """Whether a device is at work, on a step that is not known to fail."""
        is_known = bool(scope.repair or scope.keep or self.capture) or not self.change.is_none
        return not is_known and Deferred.concerns(self.subject.parameters())

    def _take(self, scope: Scope | None, scale: float, deferred: Deferred | None) -> Replay:
        subject, variant = self.subject, self.variant
        try:
            is_emulated = self.change.emulated and variant.precision is None
            below = beneath(record=bool(scope), half=is_emulated)
            with preserved(subject), below as execution, torch.enable_grad():
                subject.set_generators()
                set_scale(subject, scale)
                drive = Drive(subject, variant, execution, scale)
                drive.keeps_gradients = self.change.gradients
                drive.makes_digest = self.change.digest
                drive.may_be_left_out = bool(self.capture)  # what it did before is all that counts
                captured = Captured(self.capture, execution.half.execute)
                execute = captured.execute if self.capture else execution.half.execute
                recorder = Recorder(execute, scope, deferred) if scope else None
                if deferred is not None:
                    drive.holds = deferred.holds
                if recorder:
                    recorder.next_step(subject.step)
                recording = recorder.recording(subject.model) if recorder else _NOT_RECORDED
                if self.change.halves:
                    drive.halves = execution.half.seen = LossHalves(subject.model)
                with contextlib.closing(captured), recording, self.change.applied(subject):
                    drive.run(self.batch, recorder)
                run, trace = drive.tell(recorder)
                return Replay(
                    variant,
                    run,
                    trace,
                    drive.digest,
                    drive.weights,
                    kept=recorder.kept if recorder else None,
                    gradients=drive.gradients,
                    captured=captured,
                    unscaled=drive.unscaled,
                )
        except (Exception, SystemExit) as error:
            if self.change.is_none and isinstance(error, NanhuntError):
                raise
            if self.change.is_none and variant == NATIVE:
                raise SubjectError(f"the step raised {told(error)}") from error
            run = Run(variant.name, variant.without, raised=told(error))
            return Replay(variant, run)


def blame_terms(subject: Subject, batch: Any, at: Sequence[str]) -> dict[str, bool]:
    """Rank the loss terms: whether each one's own backward is finite, over one retained graph.

    Cheap, and only a ranking: two terms may be finite each and overflow together, so every claim
    about a term is confirmed by a real replay.

    Args:
        subject: what is examined.
        batch: the batch.
        at: names of the parameters at which the gradients are looked at; the nearer they are to
            the loss, the less of the backward has to run.
    """
    finite: dict[str, bool] = {}
    with preserved(subject), beneath(), torch.enable_grad():
        subject.set_generators()
        copied = cast_batch(NATIVE, batch)
        value = subject.call_loss(copied)
        if not isinstance(value, Mapping):
            return {}
        parameters = [p for name, p in subject.model.named_parameters() if name in at]
        terms = read_objective(value, NATIVE, {}).terms
        for name, term in terms.items():
            gradients: Sequence[Tensor | None] = ()
            if term.requires_grad and parameters:
                gradients = torch.autograd.grad(
                    term, parameters, retain_graph=True, allow_unused=True
                )
            finite[name] = is_finite(term) and all(is_finite(g) for g in gradients if g is not None)
    return finite
