"""Transformers: `Trainer(callbacks=[WatchCallback()])` watches every step that it takes."""

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from nanhunt.watching import Watch, watch


class WatchCallback(TrainerCallback):
    """A watch over a `Trainer`; its arguments are the choices of `nanhunt.watch`.

    The loss is what the model returns, so a `compute_loss` of one's own is replayed without what
    it adds. The trainer clips before its callbacks are asked: the norms are those after it, and
    one non-finite gradient has made all of them so. A step that is not finite is withheld: its
    gradients are None when the optimizer comes to them; the scheduler is stepped all the same.
    """

    watch: Watch

    def __init__(self, **choices: Any) -> None:
        self._choices = choices
        self._hooks: list[Any] = []
        self._loss: Tensor | None = None
        self._is_open = self._is_judged = False

    def on_train_begin(self, args: Any, *_: Any, **kwargs: Any) -> None:
        """Begin with the model and the optimizer that the trainer has prepared."""
        self._release()
        if args.logging_nan_inf_filter:
            warnings.warn(
                "Transformers leaves non-finite losses out of its log (logging_nan_inf_filter="
                "True): a falling loss there does not say that all steps were finite",
                stacklevel=2,
            )
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        scaler, parts = getattr(optimizer, "scaler", None), args.gradient_accumulation_steps
        own = {"scaler": scaler, "accumulate": parts}
        bare = getattr(optimizer, "optimizer", optimizer)  # Accelerate puts one around it
        self.watch = watch(model, bare, **{**own, **self._choices})
        self._hooks = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave),
        ]

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Forwards belong to a step from here on."""
        self._is_open, self._is_judged = True, False

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_open and torch.is_grad_enabled() and self._loss is None:
            self.watch.before_step(partial(_compute, model), batch=(args, kwargs))

    def _leave(self, _model: nn.Module, _args: Any, output: Any) -> None:
        if self._is_open and torch.is_grad_enabled():
            self._loss = _loss_in(output)

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """End a micro-batch."""
        if self._loss is not None:
            self.watch.after_backward(self._loss, last=False)
            self._loss = None

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Judge the step; its gradients are unscaled and clipped by now."""
        self._is_open = False
        if self._loss is not None:
            self._is_judged = True
            self.watch.after_backward(self._loss)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """End the step."""
        self._loss = None
        if self._is_judged:
            self.watch.after_step()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Take the hooks off the model."""
        self._release()

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _compute(model: nn.Module, batch: Any) -> Any:
    """The loss of a batch once more."""
    args, kwargs = batch
    return _loss_in(model(*args, **kwargs))


def _loss_in(output: Any) -> Any:
    """The loss that a model returns: under its name, or first of a tuple."""
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    return output[0] if loss is None and isinstance(output, tuple) else loss
