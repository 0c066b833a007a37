"""The loop's guard: takes the steps of a training, and does not take those that would spoil it."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from nanhunt.errors import UsageError
from nanhunt.processes import agree, are_several
from nanhunt.records import Figures, Why
from nanhunt.watching.call import Call, loss_of
from nanhunt.watching.choices import Choices
from nanhunt.watching.clock import Clock
from nanhunt.watching.court import Court
from nanhunt.watching.drift import Drift
from nanhunt.watching.held import Held
from nanhunt.watching.journal import Journal, figures_of, rates_of
from nanhunt.watching.moment import Moment, tables_of
from nanhunt.watching.outcome import Outcome
from nanhunt.watching.previous import Previous
from nanhunt.watching.pulse import clip, flag_gradients, measure_norms, take_pulse
from nanhunt.watching.running import Part, Running
from nanhunt.watching.scaling import Scaling
from nanhunt.watching.verdict import judge


class _WithheldError(Exception):
    """Leaves an optimizer that evaluates the loss itself, before it has changed anything."""


class Watch:
    """What `nanhunt.watch` returns.

    `step` takes a whole step. A framework that takes it itself calls `before_step` before each
    forward, `after_backward` once the gradients are there, and `after_step` when the optimizers
    have stepped, or have been kept from it; `undo_step` where it raised in between.

    A step that is not finite is not taken, and leaves what a plain loop that skips it would leave:
    parameters, optimizer and scheduler as before, no gradients, the random generators where the
    forward left them, and so the buffers; but where the forward made a buffer non-finite, all of
    them are put back, and `Outcome.notes` says so. A scaler lowers its scale if it found the
    gradients non-finite, and is left as it was where only the loss is. A step that raises has not
    been: generators and buffers are put back, gradients are dropped and micro-batches start again;
    what an optimizer had changed before it raised stays changed.
    """

    def __init__(self, choices: Choices) -> None:
        self._choices = choices
        self._held = Held(choices.model, choices.optimizers, choices.groups)
        keeps = choices.keep_previous and not choices.needs_closure
        self._previous = Previous(self._held, choices.optimizers) if keeps else None
        self._court = Court(choices, self._held, self._previous)
        self._agree = choices.agree or (agree if are_several() else None)
        self._scaling = Scaling(choices.live_scaler, choices.optimizers)
        self._journal = Journal(choices.log)
        self._clock = Clock()
        self._tables = tables_of([choices.model])
        self._pool: list[Moment] = []
        self._now = Running(0)
        self._is_busy = False
        self._overflows = 0  # in a row
        self._last: int | None = None  # the step that was taken last

    # -- what is read --------------------------------------------------------------------------

    @property
    def figures(self) -> tuple[Figures, ...]:
        """The figures of the last 10,000 steps, the oldest first."""
        return self._journal.figures

    def note_validation(self, loss: float | Tensor) -> None:
        """Add a validation loss, computed after the last step, to its figures."""
        self._journal.note_validation(float(loss))

    def health(self) -> Any:
        """The figures as a pandas frame, one row for each step."""
        from nanhunt.report.health import frame

        return frame(self.figures)

    # -- a whole step --------------------------------------------------------------------------

    def step(self, closure: Callable[..., Any], *, batch: Any = None) -> Outcome:
        """Take a step, or with `accumulate` one micro-batch of it.

        Args:
            closure: computes the loss; called with the batch if it takes one argument. Returns a
                scalar, or a mapping of named terms: their sum, or the entry `"loss"`, is the loss.
            batch: what the step is given; kept in a capsule, and cast where precisions are tried.

        Raises:
            NonFiniteError: the step is not finite and the policy is to raise, or so many in a row
                were not.
            UsageError: the closure is none, or what it returns is no loss.
        """
        call = Call.of(closure, batch, later=self._choices.accumulate > 1)
        with self._alone():
            part = self._opened(call, zeroes=True)
            if self._choices.needs_closure:
                return self._evaluate(part)
            with self._undone_if_raised():
                with self._clock.outside:
                    self._run(part, call)
                if len(self._now.parts) < self._choices.accumulate:
                    part.flag = flag_gradients(self._held)
                    return Outcome(self._now.number, why="accumulating")
                with self._clock.outside:
                    self._scaling.unscale()
                if self._look() in ("", "scaler"):
                    return self._take()
            return self._withhold()

    def _run(self, part: Part, call: Call) -> None:
        """Forward and backward of a micro-batch: its share of the mean of all."""
        loss = loss_of(call())
        part.loss = loss.detach()
        if self._choices.accumulate > 1:
            loss = loss / self._choices.accumulate
        self._scaling.scaled(loss).backward()

    def _evaluate(self, part: Part) -> Outcome:
        """Have an optimizer evaluate the loss; the first time decides, a line search may fail."""
        optimizer, limit = self._choices.optimizers[0], self._choices.clip

        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(part.call() if part.call is not None else None)
            loss.backward()
            with self._clock.inside:
                if self._now.pulse is None:
                    part.loss = loss.detach()
                    if self._look():
                        raise _WithheldError
                    self._prepare()
                elif limit is not None:
                    norms, _ = measure_norms(self._held.gradients()[0])
                    again = replace(self._now.pulse, on_device=norms, norm=math.inf)
                    clip(self._held, again, limit)
            return loss

        with self._undone_if_raised():
            try:
                with self._clock.outside:
                    optimizer.step(evaluate)  # type: ignore[arg-type]  # a tensor, as LBFGS takes it
            except _WithheldError:
                pass
            else:
                return self._conclude(scheduled=self._schedule())
        return self._withhold()

    # -- the same in stations, for those who step themselves -------------------------------------

    def before_step(self, closure: Callable[..., Any] | None = None, *, batch: Any = None) -> None:
        """Note where generators and buffers stand, before the forward of each micro-batch.

        Args:
            closure: computes the loss again, for the replay of a step that fails; without it there
                is none.
            batch: as of `step`.
        """
        with self._alone():
            call = Call.of(closure, batch, later=True) if closure is not None else None
            self._opened(call, zeroes=False)

    def after_backward(
        self, loss: Tensor, *, last: bool = True, is_unscaled: bool = True
    ) -> Outcome:
        """Look at loss and gradients, before the optimizers step.

        Where the step must not be taken the gradients are set to None, so that optimizers do
        nothing; under a scaler they are left, with one that it is sure to skip.

        Args:
            loss: of the micro-batch, as it was computed.
            last: whether the step comes now; else more micro-batches follow.
            is_unscaled: whether the gradients are free of the loss scale by now.

        Returns:
            What is known by now; `why` is empty where the step may be taken.

        Raises:
            NonFiniteError: as of `step`.
        """
        now = self._now
        if not now.parts:
            raise UsageError("after_backward comes after before_step, which was not called")
        with self._alone(), self._undone_if_raised():
            now.parts[-1].loss = loss.detach()
            if not last:
                now.parts[-1].flag = flag_gradients(self._held)
                return Outcome(now.number, why="accumulating")
            self._look(is_unscaled=is_unscaled)
            if now.why in ("", "scaler"):
                self._prepare(clips=False)
                return now.outcome(self._held, stepped=False, scheduled=None)
            self._court.hear(now, self._last, keeps_gradients=self._scaling.is_on)
            if now.pulse is not None and not now.pulse.bad:
                self._court.mark_gradient()
            outcome = now.outcome(self._held, stepped=False, scheduled=None)
        try:
            self._court.answer(outcome, now.case)
        except BaseException:
            self._conclude(scheduled=None)
            raise
        return outcome

    def after_step(self, *, scheduled: bool | None = None) -> Outcome:
        """Note that the optimizers have stepped, or were kept from it, and maybe the scheduler."""
        if self._now.pulse is None:
            raise UsageError("after_step comes after after_backward, which was not called")
        with self._alone():
            if self._now.why == "scaler":
                self._now.rescue_buffers()
            return self._conclude(scheduled=scheduled)

    def undo_step(self) -> None:
        """Make a step that raised one that never was; nothing where none is running."""
        with self._alone():
            self._undo()

    # -- stations ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if self._is_busy:
            raise UsageError(
                "a step of this watch is running: neither its closure nor another thread can take "
                "another one meanwhile; give each loop a watch of its own"
            )
        self._is_busy = True
        try:
            yield
        finally:
            self._is_busy = False

    def _opened(self, call: Call | None, *, zeroes: bool) -> Part:
        """The next micro-batch of the running step, or the first of a new one."""
        parts = self._now.parts
        if not parts:
            self._clock.start()
            self._held.refresh()
            with self._clock.outside:
                for optimizer in self._choices.optimizers if zeroes else ():
                    optimizer.zero_grad()
        if len(parts) == len(self._pool):
            self._pool.append(Moment(self._tables))
        parts.append(Part(call, self._pool[len(parts)].take()))
        return parts[-1]

    @contextlib.contextmanager
    def _undone_if_raised(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._undo()
            raise

    def _undo(self) -> None:
        """Put back what a step has changed that raised, and begin anew."""
        if not self._now.parts:
            return
        self._now.parts[0].moment.restore()
        self._court.drop_gradients()
        self._scaling.reset()
        self._now.why, self._now.pulse = "raised", None
        self._conclude(scheduled=None)

    def _look(self, *, is_unscaled: bool = True) -> Why:
        """Read what there is to read, with one wait for the device, and judge."""
        now, losses = self._now, self._now.losses
        pulse = now.pulse = take_pulse(
            self._held,
            losses,
            flags=now.flags,
            scale=self._scaling.read(losses[0].device),
            agree=self._agree,
        )
        if not is_unscaled and pulse.scale:
            pulse.norms = [norm / pulse.scale for norm in pulse.norms]
            pulse.norm /= pulse.scale
        now.rates = rates_of(self._choices.optimizers)
        now.why = judge(pulse, is_scaled=self._scaling.is_on, overflows=self._overflows)
        return now.why

    def _prepare(self, *, clips: bool = True) -> None:
        """Everything between a good verdict and the optimizers."""
        choices, now = self._choices, self._now
        if now.pulse is None or now.why:
            return
        if clips and choices.clip is not None:
            now.clipped = clip(self._held, now.pulse, choices.clip)
        if self._previous is not None:
            self._previous.take(now.number)
        if choices.measure_every and now.number % choices.measure_every == 0:
            now.drift = Drift(self._held)

    def _take(self) -> Outcome:
        """Take the step as a plain loop does; what overflows at its scale, the scaler skips."""
        choices, now = self._choices, self._now
        self._prepare()
        if not now.why:
            with self._clock.outside:
                self._scaling.step()
            return self._conclude(scheduled=self._schedule())
        with self._clock.outside:
            if len(choices.optimizers) > 1 and choices.clip is not None:
                # No norm is left to clip those gradients by that are finite.
                self._court.drop_gradients()
                self._scaling.update()
            else:
                self._scaling.step()
        now.rescue_buffers()
        return self._conclude(scheduled=False if choices.schedulers else None)

    def _schedule(self) -> bool | None:
        with self._clock.outside:
            for scheduler in self._choices.schedulers:
                scheduler.step()
        return True if self._choices.schedulers else None

    def _withhold(self) -> Outcome:
        """Do not take the step, and find out why."""
        now = self._now
        with self._undone_if_raised():
            self._court.hear(now, self._last, keeps_gradients=self._scaling.is_on)
            if now.why == "scaler":  # a smaller scale fits, after all
                return self._take()
            self._court.drop_gradients()
            self._scaling.settle(now.pulse)
        outcome = self._conclude(scheduled=False if self._choices.schedulers else None)
        self._court.answer(outcome, now.case)
        return outcome

    def _conclude(self, *, scheduled: bool | None) -> Outcome:
        """End the step: its outcome, its figures, and what counts for the next one."""
        now = self._now
        outcome = now.outcome(self._held, stepped=not now.why, scheduled=scheduled)
        if outcome.stepped:
            self._overflows, self._last = 0, now.number
            self._court.acquit()
        elif outcome.why == "scaler":
            self._overflows += 1
        figures = figures_of(
            outcome,
            nonfinite=len(now.pulse.bad) if now.pulse is not None else 0,
            rates=now.rates,
            updates=now.drift.measure() if now.drift is not None and outcome.stepped else (),
            times=self._clock.read(),
        )
        self._now = Running(now.number + 1)
        self._journal.note(figures)
        return outcome
