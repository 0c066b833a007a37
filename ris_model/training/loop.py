"""Loop: a whole training, from the first batch or from a checkpoint to the last.

A step's random state follows from the seed, the step and the process, and its batch from the seed
and the step. So a run that was cut anywhere and resumed goes the way it would have gone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

from ris_model.checkpoint import (
    BEST,
    LAST,
    Checkpoint,
    Origin,
    fill_model,
    load_checkpoint,
    save_checkpoint,
)
from ris_model.training.averaging import average
from ris_model.training.feeds import Feeds
from ris_model.training.journal import Epoch, Listener
from ris_model.training.ranks import Ranks
from ris_model.training.schedule import PLAIN, Phase, choose_phase, plan_blend
from ris_model.training.step import StepOutcome, Trainable, safe_step, write_log
from ris_model.training.validation import validate

Ending = Literal["finished", "stopped early", "interrupted"]


class Weighed(Trainable, Protocol):
    """What is trained: a step's needs, and what a schedule sets."""

    @property
    def weights(self) -> Callable[[], dict[str, float]]:
        """The live weights of the loss terms."""

    @property
    def reweight(self) -> Callable[[str, float], None]:
        """Sets one of them."""

    @property
    def reblend(self) -> Callable[[float], None]:
        """Sets the share of the sample covariance."""


class StalledError(RuntimeError):
    """Step after step was skipped; `first` is the batch with which that began."""

    def __init__(self, count: int, first: int, reason: str) -> None:
        self.first = first
        if first:
            what = f"the last {count} steps, from batch {first} on, were all skipped ({reason})"
        else:
            what = f"the first {count} steps were all skipped ({reason}): nothing was learnt"
        super().__init__(what)


@dataclass(slots=True)
class Counters:
    """Where a run is; what a checkpoint keeps beside tensors."""

    step: int = 0  # batches seen
    made: int = 0  # steps that changed the parameters
    in_a_row: int = 0  # skipped steps up to now
    best: float | None = None  # validation loss
    stale: int = 0  # epochs without a better one
    loss: float = 0.0  # sum over the steps made in this epoch, mean over the processes
    counted: int = 0  # steps made in this epoch
    skipped: int = 0  # in this epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a run is made of."""

    subject: Weighed
    origin: Origin
    feeds: Feeds
    ranks: Ranks = field(default_factory=Ranks)
    out: Path | None = None  # where the checkpoints go; none without it
    phases: tuple[Phase, ...] = PLAIN
    reference: Mapping[str, float] | None = None  # weights to validate with; the configured ones
    listeners: Sequence[Listener] = ()
    interrupted: Callable[[], bool] = lambda: False


class Trainer:
    """A run that can be made, saved and resumed."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.training = setting.origin.config.training
        self.at = Counters()
        subject = setting.subject
        self.configured = subject.weights()
        self.average = average(subject.model, decay=self.training.average_decay)
        # the incident's network has parameters that its loss does not reach
        unused = setting.origin.profile == "incident"
        unread = getattr(subject.model, "unread", ())
        self.through = setting.ranks.wrap(subject.model, unused=unused, unread=unread)
        self.stop, self.reason = False, ""
        self.began = time.monotonic()

    def resume(self, path: Path) -> None:
        """Go back to a checkpoint; a ValueError when it does not fit."""
        checkpoint = load_checkpoint(path)
        subject, state = self.setting.subject, checkpoint.state
        fill_model(subject.model, checkpoint.model, path)
        fill_model(self.average.module, checkpoint.average, path)
        self.average.n_averaged.fill_(state["averaged"])
        subject.optimizer.load_state_dict(checkpoint.optimizer)
        if subject.scheduler is not None:
            subject.scheduler.load_state_dict(state["scheduler"])
        if subject.scaler is not None:
            subject.scaler.load_state_dict(state["scaler"])
        self.at = Counters(**state["counters"])

    def run(self) -> Ending:
        """Train to the end, to the last patience, or until interrupted; save on the way.

        Raises:
            StalledError: when step after step is skipped.
        """
        steps = self.training.steps
        while self.at.step < steps:
            if self.at.stale >= self.training.patience:
                return "stopped early"
            self._step()
            if self.at.in_a_row >= self.training.skip_limit:
                raise StalledError(self.at.in_a_row, self.at.step - self.at.in_a_row, self.reason)
            if self.at.step % self.training.epoch_steps == 0 or self.at.step == steps:
                self._close_epoch()
            if self.stop:
                self._save(LAST)
                return "interrupted"
        return "finished"

    def _step(self) -> None:
        """Take the next batch."""
        setting, at = self.setting, self.at
        phase = choose_phase(setting.phases, at.step, self.training.steps)
        self._weigh(phase.scale(self.configured))
        form = setting.origin.config.covariance
        seed = setting.origin.seed
        setting.subject.reblend(plan_blend(form, self.training, step=at.step, seed=seed))
        seed_step(setting.origin.seed, at.step, setting.ranks.rank)
        setting.subject.model.train()
        outcome = safe_step(
            setting.subject,
            setting.feeds.train(at.step),
            clip=self.training.clip,
            agree=self._agree,
            through=self.through,
        )
        if at.step == 0 or not outcome.stepped:
            self._say(*write_log(outcome, setting.subject.weights()))
        self._count(outcome)
        if setting.ranks.leads:
            for listener in setting.listeners:
                listener.advance(at.step)

    def _agree(self, skip: bool) -> bool:  # noqa: FBT001  the step's own protocol
        """Whether some process skips; learn on the way whether one was told to stop."""
        skips, self.stop = self.setting.ranks.any(skip, self.setting.interrupted())
        return skips

    def _count(self, outcome: StepOutcome) -> None:
        """Enter a step into the counters and the average."""
        at = self.at
        at.step += 1
        if outcome.stepped:
            self.average.update_parameters(self.setting.subject.model)
            at.made, at.in_a_row = at.made + 1, 0
            at.loss, at.counted = at.loss + outcome.loss, at.counted + 1
        else:
            at.in_a_row, at.skipped = at.in_a_row + 1, at.skipped + 1
            self.reason = outcome.reason

    def _close_epoch(self) -> None:
        """Validate, tell, save."""
        setting, at = self.setting, self.at
        live = setting.subject.weights()
        self._weigh(self.configured if setting.reference is None else setting.reference)
        setting.subject.reblend(setting.origin.config.covariance.blend)
        weights = setting.subject.weights()
        val, terms, k_right = validate(
            setting.subject.loss_fn,
            self.average.module,
            setting.feeds.validation(),
            names=[name.removeprefix("lam_") for name, weight in weights.items() if weight],
            ranks=setting.ranks,
        )
        self._weigh(live)
        self._share_loss()
        better = math.isfinite(val) and (at.best is None or val < at.best)
        at.best, at.stale = (val, 0) if better else (at.best, at.stale + 1)
        scaler, optimizer = setting.subject.scaler, setting.subject.optimizer
        size = self.training.epoch_steps
        epoch = Epoch(
            number=-(-at.step // size),
            epochs=-(-self.training.steps // size),
            phase=choose_phase(setting.phases, at.step - 1, self.training.steps).name,
            step=at.step,
            made=at.made,
            train=at.loss / at.counted if at.counted else math.nan,
            val=val,
            terms=terms,
            k_right=k_right,
            rates=tuple(float(group["lr"]) for group in optimizer.param_groups),
            skipped=at.skipped,
            scale=None if scaler is None else float(scaler.get_scale()),
            seconds=time.monotonic() - self.began,
        )
        at.loss, at.counted, at.skipped = 0.0, 0, 0
        self.began = time.monotonic()
        self._say(*epoch.write_lines(live))
        if setting.ranks.leads:
            for listener in setting.listeners:
                listener.note(epoch)
        if better:
            self._save(BEST)
        self._save(LAST)

    def _share_loss(self) -> None:
        """Let every process hold the mean of the epoch's losses."""
        ranks = self.setting.ranks
        self.at.loss = ranks.sum([self.at.loss])[0] / ranks.world

    def _save(self, name: str) -> None:
        """Write a checkpoint."""
        setting, subject = self.setting, self.setting.subject
        if setting.out is None or not setting.ranks.leads:
            return
        scheduler, scaler = subject.scheduler, subject.scaler
        state = {
            "counters": asdict(self.at),
            "averaged": int(self.average.n_averaged),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        checkpoint = Checkpoint(
            origin=setting.origin,
            model=subject.model.state_dict(),
            average=self.average.module.state_dict(),
            optimizer=subject.optimizer.state_dict(),
            state=state,
        )
        save_checkpoint(setting.out / name, checkpoint)

    def _weigh(self, weights: Mapping[str, float]) -> None:
        """Set the live weights."""
        live = self.setting.subject.weights()
        for name, value in weights.items():
            if name in live and live[name] != value:
                self.setting.subject.reweight(name, value)

    def _say(self, *lines: str) -> None:
        """Tell the listeners of the leading process."""
        for listener in self.setting.listeners if self.setting.ranks.leads else ():
            for line in lines:
                listener.hear(line)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Set torch's random state for a step of a process."""
    word = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(word >> 1))
