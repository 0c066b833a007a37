"""Several training steps in a row, for real, up to the first that fails."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from nanhunt.errors import NanhuntError, SubjectError
from nanhunt.recorder import Recorder, Scope
from nanhunt.records import Pace
from nanhunt.replay.drive import Drive, has_scaler
from nanhunt.replay.step import Replay, replay
from nanhunt.snapshot import remember
from nanhunt.subject import Subject, told
from nanhunt.variants import NATIVE, Execution, beneath


@dataclass(frozen=True, slots=True)
class Course:
    """What a row of steps showed.

    `subject` stands at the step that failed, else at the last one, and is as it was before that
    step; `replay` is that very step, with all that it depends on, or None where every step was
    finite.
    """

    subject: Subject
    batch: Any
    pace: tuple[Pace, ...]
    replay: Replay | None = None


def take_steps(
    subject: Subject,
    first: int,
    count: int,
    progress: Callable[[str], object],
    *,
    may_end_left_out: bool = False,
) -> Course:
    """Take up to `count` real steps from batch `first` on; stop at the first that fails.

    The subject is left as it was before the step that is returned; who wants it as it was before
    them all wraps the call in `preserved`. A step whose gradients overflow at the loss scale and
    fit a smaller one from 1 up is healthy: the scaler skips it and the next one is taken. So is one
    that the program leaves out, which the last one must not be unless that is said.

    Raises:
        SubjectError: a step cannot be run.
    """
    pace: list[Pace] = []
    with beneath(record=True) as execution:
        # One recorder for all: what a step leaves non-finite may show in a later one.
        recorder = Recorder(execution.half.execute, Scope(modules=True))
        for index in range(first, first + count):
            progress(f"step {index}")
            is_last = index == first + count - 1
            one = _Step(
                subject.at(index),
                recorder,
                execution,
                may_be_left_out=may_end_left_out or not is_last,
            )
            restore = remember(one.subject)
            failed = one.take()
            if failed is not None and one.is_overflow:
                restore()
                failed = None if one.is_skipped_rightly() else failed
            pace.append(one.pace)
            if failed is not None or is_last:
                restore()
                return Course(one.subject, one.batch, tuple(pace), failed)
            one.advance_schedule()
    raise SubjectError(f"so many steps cannot be taken: {count}; at least 1")


class _Step:
    """One of the steps."""

    def __init__(
        self,
        subject: Subject,
        recorder: Recorder,
        execution: Execution,
        *,
        may_be_left_out: bool,
    ) -> None:
        self.subject, self.recorder, self.execution = subject, recorder, execution
        self._may_be_left_out = may_be_left_out
        subject.set_generators()
        self.batch = _batch_of(subject)
        self.scale = float(subject.scaler.get_scale()) if has_scaler(subject) else 1.0
        self.pace = Pace(subject.step, math.nan, math.nan, _largest_parameter(subject))
        self.is_overflow = False

    def take(self) -> Replay | None:
        """Take the step; what it showed if it failed."""
        self.recorder.next_step(self.subject.step)
        drive = self._drive(self.recorder)
        run, trace = drive.tell(self.recorder if drive.failures else None)
        norm = math.hypot(*(group.norm for group in run.groups)) if run.groups else math.nan
        if drive.is_left_out:
            self.pace = replace(self.pace, skipped=True)
            return None
        self.pace = replace(self.pace, loss=run.loss, gradient=norm)
        self.is_overflow = has_scaler(self.subject) and set(drive.failures) == {"gradient"}
        if not drive.failures:
            return None
        return Replay(NATIVE, run, trace, drive.digest, drive.weights)

    def is_skipped_rightly(self) -> bool:
        """Whether a smaller loss scale fits; if so the step is taken, which skips it."""
        if not replay(self.subject, self.batch, NATIVE, scope=None).run.is_finite:
            return False
        with self.execution.half:
            self._drive(None)
        self.pace = replace(self.pace, skipped=True)
        return True

    def advance_schedule(self) -> None:
        """Step the scheduler as a plain loop does: after a step that happened."""
        subject = self.subject
        if subject.scheduler is not None and subject.train_step is None and not self.pace.skipped:
            subject.scheduler.step()

    def _drive(self, recorder: Recorder | None) -> Drive:
        subject = self.subject
        drive = Drive(subject, NATIVE, self.execution, self.scale)
        drive.may_be_left_out = self._may_be_left_out
        subject.set_generators()
        recording = recorder.recording(subject.model) if recorder else contextlib.nullcontext()
        try:
            with torch.enable_grad(), recording:
                drive.run(self.batch, recorder)
        except NanhuntError:
            raise
        except (Exception, SystemExit) as error:
            raise SubjectError(f"step {subject.step} raised {told(error)}") from error
        return drive


def _batch_of(subject: Subject) -> Any:
    """The batch of the subject's step; a sequence starts again at its end, as an epoch does."""
    batches, step = subject.batches, subject.step
    return subject.batch(step if callable(batches) or step < 0 else step % max(len(batches), 1))


def _largest_parameter(subject: Subject) -> float:
    with torch.no_grad():
        sizes = [float(p.detach().abs().max()) for p in subject.parameters() if p.numel()]
    return max(sizes, default=0.0)
