"""Detection: what a heat map says of a batch, and how sources are read off it.

Shapes: B scenes, G cells, K source slots (K_MAX).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ris_model.cells import Cells


@dataclass(frozen=True, slots=True)
class Detection:
    """What the sound network says of a batch, in at least FP32."""

    heat: torch.Tensor  # [B, G] logits
    offsets: torch.Tensor  # [B, G, 3] cells, of a source in that cell
    log_scales: torch.Tensor  # [B, G, 3] of the Laplace error of the offset, in cells
    log_power: torch.Tensor  # [B, G] of a source in that cell
    log_noise: torch.Tensor  # [B] log sigma^2
    k_logits: torch.Tensor  # [B, K] class c means c + 1 sources


@dataclass(frozen=True, slots=True)
class Sources:
    """Sources read off a heat map, hottest first."""

    points: torch.Tensor  # [B, K, 3] (phi, theta, r) in rad, rad, m
    log_power: torch.Tensor  # [B, K]
    cells: torch.Tensor  # [B, K] int64, flattened index


def bound(x: torch.Tensor, span: float) -> torch.Tensor:
    """Bend x smoothly into (-span, span); slope 1 at 0, never 0 before tanh itself rounds to 1."""
    return span * (x / span).tanh()


def decode(detection: Detection, cells: Cells, count: int) -> Sources:
    """Read `count` sources off a heat map: the hottest cells, moved by their offsets.

    The choice of the cells has no gradient; the offset and the power of a chosen cell do.
    """
    index = cells.pick_peaks(detection.heat, count)
    whole = cells.list_coordinates(detection.offsets)[index]
    offset = detection.offsets.gather(1, index[..., None].expand(-1, -1, 3))
    return Sources(
        points=cells.resolve(whole + offset),
        log_power=detection.log_power.gather(1, index),
        cells=index,
    )
