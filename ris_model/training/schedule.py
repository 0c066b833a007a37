"""Schedule: the learning rate by steps, the weights of the terms by phases."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from ris_model.config import CovarianceForm, Training


def plan_rate(
    optimizer: torch.optim.Optimizer,
    training: Training,
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine down to a floor; counted in steps that happened."""

    def share(step: int) -> float:
        rise = min(1.0, (step + 1) / max(1, training.warmup))
        done = min(1.0, max(0, step - training.warmup) / max(1, training.steps - training.warmup))
        floor = training.rate_floor
        return rise * (floor + (1.0 - floor) * (1.0 + math.cos(math.pi * done)) / 2.0)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


# Tells the random numbers of the blend from those of the scenes and of the step.
_BLEND = 0x0B1E4D
# Least rise of the blend, epochs.
_LEAST_RISE = 2


def plan_blend(form: CovarianceForm, training: Training, *, step: int, seed: int) -> float:
    """Share of the sample covariance in R_blend at a step: beta min(1, n / rise) +- jitter.

    rise = max(2 epochs, `blend_rise` of all steps). While the network knows nothing, a share of
    the samples would hide that from the losses; later the jitter keeps it from leaning on one
    share. The jitter is uniform, follows from seed and step alone, and never leaves [0, 1].
    """
    rise = max(_LEAST_RISE * training.epoch_steps, form.blend_rise * training.steps)
    share = form.blend * (min(1.0, step / rise) if form.blend_rise else 1.0)
    if not form.blend_jitter:
        return share
    rng = np.random.default_rng(np.random.SeedSequence((seed, step, _BLEND)))
    return min(1.0, max(0.0, share + float(rng.uniform(-1.0, 1.0)) * form.blend_jitter))


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the training, and by what the configured weights are multiplied in it."""

    name: str
    factors: Mapping[str, float] = field(default_factory=dict)  # 1 for what is not named

    def scale(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Weights of this phase from the configured ones."""
        return {name: value * self.factors.get(name, 1.0) for name, value in weights.items()}


# One phase for the whole run.
PLAIN = (Phase("no-curriculum"),)
# Thirds of the run: where the sources are seen, how far they are, everything together. The first
# has no term that reads a range alone; what `aux` says of the angles, `peak` says there.
CURRICULUM = (
    Phase(
        "angles",
        {
            "lam_cov": 0.25,
            "lam_cov_pred": 0.25,
            "lam_cross": 0.0,
            "lam_K": 0.1,
            "lam_gap": 0.5,
            "lam_aux": 0.0,
            "lam_peak": 3.5,
            "lam_range": 0.0,
        },
    ),
    Phase(
        "range",
        {
            "lam_cov": 0.5,
            "lam_cov_pred": 0.5,
            "lam_cross": 0.4,
            "lam_K": 0.2,
            "lam_gap": 0.8,
            "lam_aux": 0.7,
        },
    ),
    Phase("joint", {"lam_cov": 0.7}),
)


def choose_phase(phases: tuple[Phase, ...], step: int, steps: int) -> Phase:
    """Return the phase of a step; all phases are equally long."""
    return phases[min(len(phases) - 1, step * len(phases) // max(1, steps))]
