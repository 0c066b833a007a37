"""Objective: the terms of a profile with their live weights; the sum of its terms is the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from torch import nn

from ris_model.config import Config, LossWeights
from ris_model.data import Batch
from ris_model.linalg import at_least_fp32
from ris_model.losses.incident import INCIDENT_TERMS, prepare_prediction
from ris_model.losses.sound import SOUND_TERMS, prepare_detection
from ris_model.losses.terms import Term

# In the order of the weights, which is the order in which the terms are added up.
ORDER = tuple(field.name.removeprefix("lam_") for field in fields(LossWeights))


class Objective(nn.Module):
    """All terms of a profile and their live weights, which are one frozen record."""

    table: ClassVar[dict[str, type[Term]]] = INCIDENT_TERMS

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.weights = config.weights
        chosen = {name: self.table[name](config) for name in ORDER if name in self.table}
        self.terms = nn.ModuleDict(chosen)

    def forward(self, prediction: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Weighted terms by name; their sum is the loss."""
        view = prepare_prediction(prediction, batch, self.config)
        return self.weigh(lambda term: term(view))

    def weigh(self, evaluate: Callable[[nn.Module], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Evaluate every term whose weight is not 0; one of weight 0 is not built."""
        weights = self.list_weights()
        return {
            name: weight * evaluate(term)
            for name, term in self.terms.items()
            if (weight := weights[f"lam_{name}"]) != 0
        }

    def list_weights(self) -> dict[str, float]:
        """Read the weights as this objective holds them now."""
        return {f"lam_{name}": getattr(self.weights, f"lam_{name}") for name in self.terms}

    def reblend(self, share: float) -> None:
        """Set the share of the sample covariance in R_blend."""
        form = replace(self.config.covariance, blend=share)
        self.config = replace(self.config, covariance=form)

    def reweight(self, name: str, value: float) -> None:
        """Set one weight; a ValueError lists the known names."""
        known = self.list_weights()
        if name not in known:
            msg = f"there is no weight {name!r}; choose one of {', '.join(known)}"
            raise ValueError(msg)
        self.weights = replace(self.weights, **{name: float(value)})


class SoundObjective(Objective):
    """The objective of the sound profile: in at least FP32 also under autocast."""

    table: ClassVar[dict[str, type[Term]]] = SOUND_TERMS

    def forward(self, prediction: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Weighted terms by name; what is not finite gives losses that are not.

        Of a detection, or of labels, they are the plain sum of the detection, made NaN: no matrix
        is decomposed that holds a NaN, which would raise, and nothing hides that the step must be
        skipped.
        """
        with torch.autocast(batch.y.device.type, enabled=False):
            sums = (at_least_fp32(getattr(prediction, f.name)).sum() for f in fields(prediction))
            total = torch.stack(list(sums)).sum()
            if not all(getattr(batch, f.name).isfinite().all() for f in fields(batch)):
                total = total * torch.nan
            if total.isfinite():
                view = prepare_detection(prediction, batch, self.config)
                return self.weigh(lambda term: term(view))
            return self.weigh(lambda _: total)
