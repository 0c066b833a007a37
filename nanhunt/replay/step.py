"""One subject, one variant: the step is run once and everything is put back."""

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nanhunt.errors import NanhuntError, SubjectError
from nanhunt.recorder import Recorder
from nanhunt.records import Group, Run, Sink, Term, Trace
from nanhunt.replay.ends import (
    fingerprint,
    is_finite,
    measure_batch,
    measure_gradients,
    measure_outputs,
    note_state,
    read_sink,
    without_gradient,
)
from nanhunt.replay.objective import (
    Objective,
    check_loss,
    count_ops,
    read_objective,
    strangers_kept,
    term_owners,
)
from nanhunt.snapshot import preserved, seed_generators
from nanhunt.subject import Subject, told
from nanhunt.variants import NATIVE, Execution, Variant, above, beneath, cast_batch

# GradScaler starts here and halves on overflow; below 1 a scale is no remedy any more.
INITIAL_SCALE = 65536.0


@dataclass(frozen=True, slots=True)
class Replay:
    """What one replay gave: its line in the report, its trace if recorded, and its bits.

    `fingerprint` digests loss and gradients bit by bit; two replays of a deterministic step agree.
    `weights` are those that the live objective held while the step ran.
    """

    variant: Variant
    run: Run
    trace: Trace | None = None
    fingerprint: str = ""
    weights: Mapping[str, float] = field(default_factory=dict)


def replay(
    subject: Subject, batch: Any, variant: Variant = NATIVE, *, record: bool = True
) -> Replay:
    """Run the step of a subject once and put everything back.

    Args:
        subject: what is examined; parameters, buffers, gradients, optimizer, scaler, random
            generators, module modes and torch's switches are as before afterwards.
        batch: the batch; it is copied, never written to.
        variant: how the step differs from the one given.
        record: whether to record every op; without it only loss and gradients are measured.

    Returns:
        The replay. One that raises under a variant is a `Run` with `raised`.

    Raises:
        SubjectError: the step as given cannot be run, or its loss is not what a loss must be.
        UsageError: the variant names a term or weight that does not exist.
    """
    start = time.perf_counter()
    scale = _first_scale(subject, variant)
    # Under a scale, recording waits until the scale is known at which there is something to see.
    done = _attempt(subject, batch, variant, record=record and scale <= 1.0, scale=scale)
    if scale > 1.0 and done.run.raised is None and not done.run.is_finite:
        done = _fit_scale(subject, batch, variant, record=record, failed=done)
    if record and done.trace is None and done.run.raised is None and variant.name == NATIVE.name:
        # The native trace also counts the ops of each term, so it is wanted of a finite step too.
        recorded = _attempt(subject, batch, variant, record=True, scale=done.run.scale or 1.0)
        notes = tuple(dict.fromkeys((*recorded.run.notes, *done.run.notes)))
        done = replace(recorded, run=replace(recorded.run, notes=notes))
    return replace(done, run=replace(done.run, seconds=time.perf_counter() - start))


def _first_scale(subject: Subject, variant: Variant) -> float:
    if variant.scaled:
        return INITIAL_SCALE
    if subject.scaler is not None and subject.scaler.is_enabled():
        return float(subject.scaler.get_scale())
    return 1.0


def _fit_scale(
    subject: Subject, batch: Any, variant: Variant, *, record: bool, failed: Replay
) -> Replay:
    """Halve the scale as GradScaler would; a step that no scale from 1 up makes finite has failed.

    The search assumes that what overflows at one scale overflows at every larger one.
    """
    lowest = _attempt(subject, batch, variant, record=record, scale=1.0)
    if not lowest.run.is_finite:
        note = f"non-finite at loss scale {failed.run.scale:g} and still at 1"
        return replace(lowest, run=replace(lowest.run, notes=(*lowest.run.notes, note)))
    fits, fails = 0, math.ceil(math.log2(failed.run.scale or 1.0))
    best = lowest
    while fails - fits > 1:
        middle = (fits + fails) // 2
        tried = _attempt(subject, batch, variant, record=False, scale=2.0**middle)
        if tried.run.is_finite:
            fits, best = middle, tried
        else:
            fails = middle
    note = f"gradients overflow at loss scale {failed.run.scale:g}; {2.0**fits:g} fits"
    return replace(best, run=replace(best.run, notes=(*best.run.notes, note)))


def _attempt(
    subject: Subject, batch: Any, variant: Variant, *, record: bool, scale: float
) -> Replay:
    try:
        with preserved(subject), beneath(record=record) as execution, torch.enable_grad():
            seed_generators(subject.seed)
            for parameter in subject.parameters():
                parameter.grad = None
            step = _Step(subject, variant, execution, scale)
            # What each module did is told of the step as given; elsewhere it only costs.
            watch = variant == NATIVE
            recorder = Recorder(execution.half.execute, watch_modules=watch) if record else None
            return step.run(batch, recorder)
    except NanhuntError:
        raise
    except (Exception, SystemExit) as error:
        if variant == NATIVE:
            raise SubjectError(f"the step raised {told(error)}") from error
        run = Run(variant.name, variant.without, raised=told(error))
        return Replay(variant, run)


class _Step:
    """The stations of one step, in order; each leaves what it measured for the next."""

    def __init__(
        self, subject: Subject, variant: Variant, execution: Execution, scale: float
    ) -> None:
        self.subject, self.variant, self.execution = subject, variant, execution
        self.scale = scale
        self.notes: list[str] = []
        self.owners: dict[int, tuple[str, ...]] = {}

    def run(self, batch: Any, recorder: Recorder | None) -> Replay:
        """Forward, backward and optimizer step, measured at each end."""
        subject, model = self.subject, self.subject.model
        copied = cast_batch(self.variant, batch)
        for name in self.variant.without:
            if name in subject.live_weights():
                subject.reweighted(name, 0.0)
        weights = subject.live_weights()
        recording = recorder.recording(model) if recorder else contextlib.nullcontext()
        outputs: tuple[Sink, ...] = ()
        with contextlib.ExitStack() as precision, recording:
            precision.enter_context(above(self.variant, subject, self.execution))
            if recorder:
                note_state(recorder, subject, copied)
            objective = self._forward(copied)
            if recorder:
                self.owners = term_owners(objective.terms)
                outputs = measure_outputs(recorder)
            self._backward(objective.loss, recorder)
            groups, sinks = measure_gradients(subject, recorder)
            stepped: list[Sink] = []
            if all(group.nonfinite == 0 for group in groups) and is_finite(objective.loss):
                stepped = self._optimize(recorder)
        sinks = [read_sink("loss", "loss", objective.loss, recorder), *sinks, *stepped]
        digest = fingerprint(objective.loss, model)
        events = recorder.events() if recorder else ()
        terms = count_ops(objective.terms, self.owners, events)
        run = self._line(objective, terms, groups, len(stepped), len(events))
        if recorder is None:
            return Replay(self.variant, run, None, digest, weights)
        trace = Trace(
            events,
            tuple(sinks),
            state=recorder.state,
            loss=run.loss,
            terms=terms,
            owners=self.owners,
            batch=measure_batch(copied),
            outputs=outputs,
            without_gradient=without_gradient(model),
            passages=tuple(recorder.passages),
        )
        return Replay(self.variant, run, trace, digest, weights)

    def _forward(self, batch: Any) -> Objective:
        subject = self.subject
        value = subject.call_loss(batch)
        objective = read_objective(value, self.variant, subject.live_weights())
        check_loss(objective.loss)
        return objective

    def _backward(self, loss: Tensor, recorder: Recorder | None) -> None:
        if recorder:
            recorder.stage = "backward"
        with strangers_kept(loss, self.subject.parameters()):
            (loss * self.scale if self.scale != 1.0 else loss).backward()

    def _optimize(self, recorder: Recorder | None) -> list[Sink]:
        """Step the optimizer and return the parameters that it made non-finite."""
        optimizer = self.subject.optimizer
        if optimizer is None:
            return []
        if isinstance(optimizer, torch.optim.LBFGS):
            self.notes.append("the optimizer step needs a closure and was not replayed")
            return []
        if recorder:
            recorder.stage = "optimizer"
        if self.scale != 1.0:
            for parameter in self.subject.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(self.scale)
        optimizer.step()
        sinks = (
            read_sink("stepped", name, parameter, recorder)
            for name, parameter in self.subject.model.named_parameters()
            if parameter.requires_grad
        )
        return [sink for sink in sinks if not sink.is_finite]

    def _line(
        self,
        objective: Objective,
        terms: tuple[Term, ...],
        groups: Sequence[Group],
        stepped: int,
        ops: int,
    ) -> Run:
        notes = list(self.notes)
        if self.execution.half.used:
            notes.append("fp16 (emulated accumulation)")
        if self.variant.net_only and not self.execution.root_forwards:
            notes.append("the root module was not called as a whole: autocast had no effect")
        scaled = [replace(group, norm=group.norm / self.scale) for group in groups]
        return Run(
            variant=self.variant.name,
            ablated=self.variant.without,
            loss=float(objective.loss.detach()),
            terms=terms,
            groups=tuple(scaled),
            stepped_nonfinite=stepped,
            scale=self.scale if self.scale != 1.0 else None,
            notes=tuple(notes),
            ops=ops,
        )


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
        seed_generators(subject.seed)
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
