"""Averaging: the moving average of the parameters, which is what is validated and handed on."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def average(model: nn.Module, *, decay: float) -> AveragedModel:
    """Follow a model: p_avg <- d p_avg + (1 - d) p,  d = min(decay, (n + 1) / (n + 10)).

    n counts the updates. The decay rises to its value: with a fixed one a short run would be
    judged by its initial parameters.
    """

    def mix(
        averaged: torch.Tensor,
        current: torch.Tensor,
        count: torch.Tensor | int,
    ) -> torch.Tensor:
        updates = int(count)
        d = min(decay, (updates + 1) / (updates + 10))
        return averaged.lerp(current, 1.0 - d)

    return AveragedModel(model, avg_fn=mix)
