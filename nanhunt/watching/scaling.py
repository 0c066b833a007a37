"""The scaler of a training: led through a step, and through one that is not taken."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nanhunt.watching.pulse import Pulse


class Scaling:
    """A `GradScaler` that is enabled, or none."""

    def __init__(self, scaler: Any, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._scaler, self._optimizers = scaler, optimizers
        self._unit: Tensor | None = None
        self._has_unscaled = False

    @property
    def is_on(self) -> bool:
        """Whether there is one."""
        return self._scaler is not None

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to differentiate."""
        return loss if self._scaler is None else self._scaler.scale(loss)

    def read(self, device: torch.device) -> Tensor | None:
        """The scale, left on a device: what it makes of 1."""
        if self._scaler is None:
            return None
        if self._unit is None or self._unit.device != device:
            self._unit = torch.ones((), device=device)
        scale: Tensor = self._scaler.scale(self._unit)
        return scale

    def unscale(self) -> None:
        """Divide the gradients by the scale, once per step."""
        if self._scaler is None:
            return
        self._has_unscaled = True
        for optimizer in self._optimizers:
            self._scaler.unscale_(optimizer)

    def step(self) -> None:
        """Step the optimizers; those whose gradients overflow, the scaler skips."""
        for optimizer in self._optimizers:
            optimizer.step() if self._scaler is None else self._scaler.step(optimizer)
        self.update()

    def update(self) -> None:
        """Choose the next scale by what was found."""
        if self._scaler is not None:
            self._scaler.update()
            self._has_unscaled = False

    def settle(self, pulse: Pulse | None) -> None:
        """Choose the next scale of a step that is not taken.

        It is lowered where the scaler found the gradients non-finite, and stays where it did not.
        """
        if pulse is not None and pulse.scale and pulse.bad and math.isfinite(pulse.scale):
            if self._has_unscaled:
                self.update()
        else:
            self.reset()

    def reset(self) -> None:
        """Have the scaler forget that it has unscaled, with its scale as it is."""
        if self._has_unscaled:
            self._scaler.update(float(self._scaler.get_scale()))
            self._has_unscaled = False
