"""Matching: which predicted slot answers for which true source.

Shapes: B scenes, K source slots (K_MAX).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional

from ris_model.data import Batch

_ANGLE_DELTA = math.radians(0.25)  # rad, where the Huber loss of an angle turns linear
_RANGE_DELTA = 0.2  # of the logarithm of the range
_THETA_FACTOR = 1.5


def wrap_angle(angle: torch.Tensor) -> torch.Tensor:
    """Wrap an angle in radians into [-pi, pi)."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def compare_points(slots: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Huber(phi) + 1.5 Huber(theta) + Huber(log r) of [..., 3] against [..., 3], rad and m.

    The Huber loss of an angle is divided by its delta (slope 1 per radian in the linear part);
    undivided, a quarter of a degree would leave it a slope of 0.004.
    """
    phi, theta = wrap_angle(slots[..., :2] - points[..., :2]).unbind(-1)
    ratio = slots[..., 2].log() - points[..., 2].log()
    return (
        _huber(phi, _ANGLE_DELTA) / _ANGLE_DELTA
        + _THETA_FACTOR * _huber(theta, _ANGLE_DELTA) / _ANGLE_DELTA
        + _huber(ratio, _RANGE_DELTA)
    )


def match_slots(slots: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Give each true source a slot of its own at the least total cost (Hungarian).

    The assignment is found on detached values.

    Args:
        slots: [B, K, 3] (phi, theta, r) in rad, rad, m, in any order.
        batch: the labels.

    Returns:
        index [B, K] of the slot of each true source; 0 where there is no source.
    """
    cost = compare_points(slots.detach()[:, None], batch.points[:, :, None])
    table = cost.double().cpu().numpy()
    counts = batch.count.tolist()
    order = np.zeros(table.shape[:2], dtype=np.int64)
    for scene, sources in enumerate(counts):
        _, order[scene, :sources] = linear_sum_assignment(table[scene, :sources])
    return torch.from_numpy(order).to(slots.device)


def pick_slots(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Put [B, K, ...] values into the order of the true sources; the gradient goes through."""
    index = order.view(*order.shape, *(1,) * (values.dim() - 2))
    return values.gather(1, index.expand(-1, -1, *values.shape[2:]))


def _huber(error: torch.Tensor, delta: float) -> torch.Tensor:
    """Element-wise Huber loss of an error."""
    return functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=delta)
