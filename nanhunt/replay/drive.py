"""One step, driven from station to station: loss, gradients, parameters; each is measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from nanhunt.errors import SubjectError
from nanhunt.recorder import LossHalves, Recorder, unrecorded
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
from nanhunt.subject import Subject, splatted
from nanhunt.variants import Execution, Variant, above, cast_batch

Station: TypeAlias = Literal["loss", "grads", "step"]
EMULATED = "fp16 (emulated accumulation)"  # the note of a run in which a product was
STATIONS: tuple[Station, ...] = ("loss", "grads", "step")


def _always() -> bool:
    return True


class Drive:
    """Runs one step of a subject under a variant and keeps what its stations showed."""

    def __init__(
        self, subject: Subject, variant: Variant, execution: Execution, scale: float
    ) -> None:
        self.subject, self.variant, self.execution = subject, variant, execution
        self.scale = scale
        self.notes: list[str] = []
        self.owners: dict[int, tuple[str, ...]] = {}
        self.sinks: list[Sink] = []
        self.groups: list[Group] = []
        self.outputs: tuple[Sink, ...] = ()
        self.missing: tuple[str, ...] = ()
        self.batch: Any = None
        self.weights: dict[str, float] = {}
        self.digest = ""
        self.unscaled = ""
        self.keeps_gradients = False
        self.makes_digest = True
        self.is_recorded = False
        self.holds: Callable[[], bool] = _always  # what is recorded of the step, so far
        self.gradients: dict[str, Tensor] = {}
        self.halves: LossHalves | None = None
        self.has_stepped = False
        self.may_be_left_out = self.is_left_out = False
        self.loss_at: int | None = None
        self._objective: Objective | None = None
        self._loss: Tensor | None = None

    def run(self, batch: Any, recorder: Recorder | None) -> None:
        """Take the step, up to a station at which what was recorded does not hold.

        A recorder must be recording already.
        """
        self.is_recorded = recorder is not None
        with unrecorded():
            self.batch = cast_batch(self.variant, batch)
        for name in self.variant.without:
            if name in self.subject.live_weights():
                self.subject.reweighted(name, 0.0)
        self.weights = self.subject.live_weights()
        with above(self.variant, self.subject, self.execution):
            if recorder:
                recorder.stage = "forward"
                note_state(recorder, self.subject, self.batch)
            seen: list[str] = []
            for station, loss in self._stations():
                with unrecorded(), torch.no_grad():
                    self._arrive(station, loss, recorder, len(seen))
                if recorder:
                    recorder.stage = "optimizer" if station == "grads" else "forward"
                if not self.holds():
                    return
                seen.append(station)
        self._check_stations(seen)

    def _check_stations(self, seen: Sequence[str]) -> None:
        """Refuse a step that did not come by what is measured.

        It may leave itself out, where the caller knows what to do then, and end at a loss that is
        not finite: programs do so to go on with the next batch.
        """
        self.is_left_out = not seen and self.may_be_left_out
        ended = seen == ["loss"] and "loss" in self.failures
        if self.is_left_out or ended or {"loss", "grads"} <= {*seen}:
            return
        raise SubjectError(
            f"train_step is to yield ('loss', loss) and ('grads', loss); "
            f"it yielded {', '.join(map(repr, seen)) or 'nothing'}"
        )

    def _stations(self) -> Iterator[tuple[str, Tensor]]:
        """The subject's own step, or that of a plain loop."""
        subject, model = self.subject, self.subject.model
        if subject.train_step is not None:
            yield from subject.train_step(
                model, self.batch, self._call, subject.optimizer, subject.scaler, subject.step
            )
            return
        for parameter in subject.parameters():
            parameter.grad = None
        loss = self._objective_of(model, *splatted(self.batch)).loss
        yield "loss", loss
        scaler = subject.scaler if has_scaler(subject) and not self.variant.scaled else None
        with strangers_kept(loss, subject.parameters()):
            if scaler is not None:
                scaler.scale(loss).backward()
            else:
                (loss * self.scale if self.scale != 1.0 else loss).backward()
        yield "grads", loss
        if self._optimize(scaler):
            yield "step", loss

    def _call(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """What the step is given as its `loss_fn`: the subject's, less what is taken out."""
        value = self.subject.loss_fn(model, *args, **kwargs)
        objective = self._read(value)
        is_whole = isinstance(value, Mapping) and not self.variant.without + self.variant.alone
        return value if is_whole else objective.loss

    def _objective_of(self, model: Any, *args: Any) -> Objective:
        objective = self._read(self.subject.loss_fn(model, *args))
        check_loss(objective.loss)
        return objective

    def _read(self, value: Any) -> Objective:
        """Note the terms of a loss, and who owns which node."""
        objective = read_objective(value, self.variant, self.subject.live_weights())
        self._objective = objective
        # Who owns a node is asked of the events only.
        for number, names in term_owners(objective.terms if self.is_recorded else {}).items():
            known = self.owners.get(number, ())
            self.owners[number] = (*known, *(name for name in names if name not in known))
        return objective

    def _arrive(self, station: str, loss: Any, recorder: Recorder | None, order: int) -> None:
        """Measure what a station shows."""
        if station not in STATIONS:
            raise SubjectError(
                f"the stations that train_step yields are {', '.join(STATIONS)}; got {station!r}"
            )
        if station == "loss":
            is_own = self.subject.train_step is not None
            has_gradients = any(p.grad is not None for p in self.subject.parameters())
            check_loss(loss, is_backward_done=is_own and has_gradients)
            self._loss = loss.detach()
            if recorder:
                self.outputs = measure_outputs(recorder)
                self.loss_at = recorder.position if self.loss_at is None else self.loss_at
            self.sinks.append(read_sink("loss", "loss", loss, recorder, order=order))
        elif station == "grads":
            self.groups, sinks = measure_gradients(self.subject, recorder, order)
            self.sinks.extend(sinks)
            self.missing = without_gradient(self.subject.model)
            if self._loss is not None and self.makes_digest:
                self.digest += fingerprint(self._loss, self.subject.model)
                if self.keeps_gradients and self.scale != 1.0:
                    model = self.subject.model
                    self.unscaled = fingerprint(self._loss, model, scale=self.scale)
            if self.keeps_gradients:
                self._keep_gradients()
        else:
            self.has_stepped = True
            named = self.subject.model.named_parameters()
            found = (
                read_sink("stepped", name, parameter, recorder, order=order)
                for name, parameter in named
                if parameter.requires_grad and not is_finite(parameter)
            )
            self.sinks.extend(found)
            self._judge_scaler(recorder, order)

    def _keep_gradients(self) -> None:
        """Those of the loss itself, without its scale; the last ones of several."""
        scale = self.scale if self.subject.train_step is None else 1.0
        named = self.subject.model.named_parameters()
        self.gradients = {n: _unscaled(p.grad, scale) for n, p in named if p.grad is not None}

    def _judge_scaler(self, recorder: Recorder | None, order: int) -> None:
        """Look at the gradients again that the scaler has unscaled: a scale of 0 spoils them."""
        if not has_scaler(self.subject) or self.failures:
            return
        groups, sinks = measure_gradients(self.subject, recorder, order)
        if sinks:
            self.groups = groups
            self.sinks.extend(sinks)

    def _optimize(self, scaler: Any) -> bool:
        """Step the optimizer as a plain loop does, and as a scaler lets it; tell whether it did."""
        optimizer = self.subject.optimizer
        if optimizer is None:
            return False
        if isinstance(optimizer, torch.optim.LBFGS):
            self.notes.append("the optimizer step needs a closure and was not replayed")
            return False
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
            return True
        if any(not sink.is_finite for sink in self.sinks):
            return False
        if self.scale != 1.0:
            for parameter in self.subject.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(self.scale)
        optimizer.step()
        return True

    # -- what it leaves ----------------------------------------------------------------------

    @property
    def failures(self) -> tuple[str, ...]:
        """The kinds of the sinks that were not finite."""
        return tuple(dict.fromkeys(sink.kind for sink in self.sinks if not sink.is_finite))

    @property
    def stepped(self) -> int:
        """Number of parameters that the step made non-finite."""
        return sum(sink.kind == "stepped" for sink in self.sinks)

    def line(self, terms: tuple[Term, ...], ops: int) -> Run:
        """The line of the report."""
        notes = list(self.notes)
        if self.execution.half.used:
            notes.append(EMULATED)
        if self.variant.net_only and not self.execution.root_forwards:
            notes.append("the root module was not called as a whole: autocast had no effect")
        # Whether a step of its own has unscaled its gradients by then is not known.
        scale = self.scale or 1.0 if self.subject.train_step is None else 1.0
        scaled = [replace(group, norm=group.norm / scale) for group in self.groups]
        return Run(
            variant=self.variant.name,
            ablated=self.variant.without,
            loss=float(self._loss) if self._loss is not None else float("nan"),
            terms=terms,
            groups=tuple(scaled),
            stepped_nonfinite=self.stepped,
            scale=self.scale if self.scale != 1.0 else None,
            notes=tuple(notes),
            ops=ops,
            stepped=self.has_stepped,
            without_gradient=self.missing,
            loss_ops=self.halves.ops if self.halves else None,
            half_ops=self.halves.found() if self.halves else None,
        )

    def tell(self, recorder: Recorder | None) -> tuple[Run, Trace | None]:
        """The line of the report, and everything recorded."""
        events = recorder.events() if recorder else ()
        terms = self._objective.terms if self._objective else {}
        counted = count_ops(terms, self.owners, events, loss_at=self.loss_at or 0)
        run = self.line(counted, len(events))
        if recorder is None:
            return run, None
        trace = Trace(
            events,
            tuple(self.sinks),
            state=recorder.state,
            loss=run.loss,
            terms=counted,
            owners=self.owners,
            batch=measure_batch(self.batch),
            outputs=self.outputs,
            without_gradient=self.missing,
            passages=tuple(recorder.passages),
        )
        return run, trace


def _unscaled(gradient: Tensor, scale: float) -> Tensor:
    """A copy that has room for what a small scale had made fit."""
    kept = gradient.detach()
    wide = kept.float() if kept.dtype in (torch.float16, torch.bfloat16) else kept
    return wide / scale


def set_scale(subject: Subject, scale: float) -> None:
    """Give the subject's scaler another scale; `preserved` puts the old one back."""
    if has_scaler(subject) and subject.scaler.get_scale() != scale:
        subject.scaler.load_state_dict({**subject.scaler.state_dict(), "scale": scale})


def has_scaler(subject: Subject) -> bool:
    """Whether the subject scales its loss by a scaler of its own."""
    return subject.scaler is not None and bool(subject.scaler.is_enabled())
