"""Lightning: `Trainer(callbacks=[WatchCallback()])` watches every step that the trainer takes."""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from nanhunt.errors import UsageError
from nanhunt.watching import Watch, watch


class WatchCallback(Callback):
    """A watch over automatic optimization; its arguments are the choices of `nanhunt.watch`.

    Model, optimizer, scaler and accumulation are the trainer's; clipping stays its business, so the
    norms are those before it. A step that is not finite is withheld: its gradients are None when
    the optimizer comes to them. Learning-rate schedulers are stepped by Lightning all the same.
    """

    watch: Watch

    def __init__(self, **choices: Any) -> None:
        self._choices = choices
        self._loss: Tensor | None = None
        self._is_judged = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with what the trainer has set up by now."""
        if not pl_module.automatic_optimization:
            raise UsageError(
                f"{type(pl_module).__name__} optimizes manually, where Lightning does not say when "
                f"a step begins; call nanhunt.watch(...).step inside of its training_step"
            )
        self._scaler = getattr(trainer.precision_plugin, "scaler", None)
        given = {"scaler": self._scaler, "accumulate": trainer.accumulate_grad_batches}
        self.watch = watch(pl_module, trainer.optimizers, **{**given, **self._choices})

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the moment before the forward."""
        self._loss, self._is_judged = None, False
        self.watch.before_step(partial(_compute, trainer, pl_module, batch_idx), batch=batch)

    def on_before_backward(
        self, trainer: Trainer, _pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Keep the loss, as the module returned it."""
        bare = loss.detach() * trainer.accumulate_grad_batches
        scale = 1.0 if self._scaler is None else self._scaler.scale(torch.ones_like(bare))
        self._loss = bare / scale

    def on_before_optimizer_step(self, *_: Any) -> None:
        """Judge the step; Lightning has unscaled its gradients and will clip them after this."""
        if self._loss is not None:
            self._is_judged = True
            self.watch.after_backward(self._loss)

    def on_train_batch_end(self, *_: Any) -> None:
        """End the step, or the micro-batch."""
        if self._is_judged:
            self.watch.after_step()
        elif self._loss is not None:
            self.watch.after_backward(self._loss, last=False)
        else:  # training_step returned None: no step was wanted
            self.watch.undo_step()

    def on_exception(self, *_: Any) -> None:
        """Leave nothing half-done behind."""
        if hasattr(self, "watch"):
            self.watch.undo_step()


def _compute(trainer: Trainer, module: LightningModule, batch_idx: int, batch: Any) -> Any:
    """The loss of a batch once more, without its lines in the log."""
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    with _unlogged(module), trainer.precision_plugin.train_step_context():
        value = module.training_step(batch, *([batch_idx] if takes_index else []))
    return value["loss"] if isinstance(value, Mapping) else value


@contextlib.contextmanager
def _unlogged(module: LightningModule) -> Iterator[None]:
    own: dict[str, Any] = vars(module)
    before: dict[str, Any] = {name: own[name] for name in ("log", "log_dict") if name in own}
    own["log"] = own["log_dict"] = _nothing
    try:
        yield
    finally:
        del own["log"], own["log_dict"]
        own |= before


def _nothing(*_: Any, **__: Any) -> None:
    """Stands where a replay would log."""
