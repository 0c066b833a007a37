"""The journal of a watch: the figures of its last steps, and whoever is told of each."""

import math
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import torch

from nanhunt.records import Figures
from nanhunt.watching.outcome import Outcome

KEPT = 10_000  # steps whose figures are held in memory; a log gets them all


class Journal:
    """Notes each step; a log that fails is told of once, and never hurts the training."""

    def __init__(self, log: Callable[[Figures], object] | None) -> None:
        self._log = log
        self._figures: deque[Figures] = deque(maxlen=KEPT)

    @property
    def figures(self) -> tuple[Figures, ...]:
        """Of the last steps, the oldest first."""
        return tuple(self._figures)

    def note_validation(self, loss: float) -> None:
        """Add a validation loss to the last step; a log has had its figures already."""
        if self._figures:
            last = self._figures.pop()
            self._figures.append(replace(last, validated=True, validation=_finite(loss)))

    def note(self, figures: Figures) -> None:
        """Add a step."""
        self._figures.append(figures)
        if self._log is None:
            return
        try:
            self._log(figures)
        except Exception as error:  # noqa: BLE001 - a full disk is no reason to end a training
            self._log = None
            text = (
                f"nanhunt: the log raised {type(error).__name__}: {error}; it is not called again"
            )
            warnings.warn(text, RuntimeWarning, stacklevel=4)


def figures_of(
    outcome: Outcome,
    *,
    nonfinite: int,
    rates: tuple[float, ...],
    updates: tuple[tuple[str, float], ...],
    times: tuple[float, float],
) -> Figures:
    """The figures of a step that came to a decision."""
    return Figures(
        step=outcome.step,
        loss=_finite(outcome.loss),
        stepped=outcome.stepped,
        why=outcome.why if outcome.why != "accumulating" else "",
        norms=tuple((name, _finite(norm)) for name, norm in outcome.norms.items()),
        nonfinite=nonfinite,
        scale=outcome.scale,
        rates=rates,
        clipped=outcome.clipped,
        updates=updates,
        scheduled=outcome.scheduled,
        seconds=times[0],
        inside=times[1],
        notes=outcome.notes,
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def rates_of(optimizers: tuple[torch.optim.Optimizer, ...]) -> tuple[float, ...]:
    """The learning rates; one that lives on a device is left there."""
    rates = (group.get("lr") for optimizer in optimizers for group in optimizer.param_groups)
    return tuple(
        float(rate)
        for rate in rates
        if rate is not None and (not isinstance(rate, torch.Tensor) or rate.device.type == "cpu")
    )
