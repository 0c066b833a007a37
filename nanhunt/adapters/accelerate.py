"""Accelerate: `AccelerateWatch(accelerator, model, optimizer).step(...)` is its loop, watched."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from nanhunt.watching import Outcome, watch
from nanhunt.watching.call import Call, loss_of


class AccelerateWatch:
    """The documented loop of Accelerate, with each step looked at before the optimizer comes to it.

    `step` enters `accelerator.accumulate`, computes the loss, has the accelerator run the backward,
    clips, steps optimizer and scheduler and zeroes the gradients; to the bit as the loop does that
    it replaces. A step that is not finite is withheld: its gradients are None when the optimizer
    comes to them, and the scheduler is left alone.

    Args:
        accelerator: which has prepared the others.
        model: as `accelerator.prepare` returned it.
        optimizer: as it returned that.
        scheduler: as it returned that, if there is one.
        clip: largest norm of all gradients, for `accelerator.clip_grad_norm_`.
        **choices: those of `nanhunt.watch`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scheduler: Any = None,
        clip: float | None = None,
        **choices: Any,
    ) -> None:
        self._accelerator, self._model, self._clip = accelerator, model, clip
        self._optimizer, self._scheduler = optimizer, scheduler
        own = {
            "scaler": accelerator.scaler,
            "accumulate": accelerator.gradient_accumulation_steps,
        }
        bare = getattr(optimizer, "optimizer", optimizer)
        self.watch = watch(model, bare, **{**own, **choices})

    def step(self, closure: Callable[..., Any], *, batch: Any = None) -> Outcome:
        """Take a step, or one micro-batch of it; closure and batch are those of `Watch.step`."""
        try:
            with self._accelerator.accumulate(self._model):
                return self._take(closure, batch)
        except BaseException:
            self.watch.undo_step()
            raise

    def _take(self, closure: Callable[..., Any], batch: Any) -> Outcome:
        accelerator, watched = self._accelerator, self.watch
        call = Call.of(closure, batch)
        watched.before_step(closure, batch=batch)
        loss = loss_of(call())
        accelerator.backward(loss)
        if not accelerator.sync_gradients:
            return watched.after_backward(loss, last=False)
        if accelerator.scaler is not None:
            accelerator.unscale_gradients(self._optimizer)
        known = watched.after_backward(loss)
        if self._clip is not None and not known.why:
            accelerator.clip_grad_norm_(self._model.parameters(), self._clip)
        self._optimizer.step()
        if self._scheduler is not None and not known.why:
            self._scheduler.step()
        self._optimizer.zero_grad()
        scheduled = None if self._scheduler is None else not known.why
        done = watched.after_step(scheduled=scheduled)
        return replace(done, report=known.report, capsule=known.capsule)
