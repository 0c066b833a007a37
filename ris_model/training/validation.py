"""Validation: the loss and the order of scenes that are not trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ris_model.data import Batch
from ris_model.training.ranks import Ranks


def validate(
    loss_fn: Callable[[nn.Module, Any], dict[str, torch.Tensor]],
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    names: Sequence[str],
    ranks: Ranks,
) -> tuple[float, dict[str, float], float]:
    """Measure a model on batches that the ranks have shared among them.

    Args:
        loss_fn: weighted terms of a model and a batch.
        model: in any mode; it is left in evaluation mode.
        batches: this rank's part; may be empty.
        names: of the terms, the same on every rank.
        ranks: who take part.

    Returns:
        The loss, its weighted terms, the share of scenes whose number of sources is right; all
        over the scenes of all ranks.
    """
    logits: list[torch.Tensor] = []
    hook = model.register_forward_hook(lambda _, __, said: logits.append(said.k_logits))
    model.eval()
    sums = dict.fromkeys(names, 0.0)
    scenes, right = 0, 0
    try:
        for batch in batches:
            with torch.no_grad():
                terms = loss_fn(model, batch)
            for name, term in terms.items():
                sums[name] += term.item() * batch.samples
            scenes += batch.samples
            right += int((logits.pop().argmax(-1) + 1 == batch.count).sum())
    finally:
        hook.remove()
    total, hits, *means = ranks.sum([scenes, right, *(sums[name] for name in names)])
    shares = {name: value / total for name, value in zip(names, means, strict=True)}
    return sum(shares.values()), shares, hits / total
