"""Fit: the places that explain the snapshots best, by Levenberg-Marquardt from given starts.

Shapes: B scenes, S starts per scene, K sources, P = 3 K.
"""

from __future__ import annotations

from dataclasses import fields

import torch

from ris_model.config import Scenario
from ris_model.estimate.field import (
    Explanation,
    Measurements,
    Prior,
    explain,
    weigh_places,
)

# Damping of the first step, and what becomes of it after a step that lowers the cost or does not.
_DAMPING = 1e-2
_EASE, _STIFFEN = 0.2, 8.0
# Longest step in (u_x, u_y, 1/r), the last as a share of the largest 1/r in view.
_LONGEST = (0.1, 0.1, 0.2)
# How far beyond the field of view a place may lie, as a factor.
_MARGIN = 1.05
# Smallest share of a symbol's energy that is taken for its power.
_LEAST_POWER = 1e-3


def bound_places(scenario: Scenario) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower and upper bounds of (u_x, u_y, 1/r), [3] float64: the view and a margin."""
    azimuth, elevation = scenario.azimuth_limit, scenario.elevation_limit
    u = torch.tensor((azimuth, elevation), dtype=torch.float64).sin() * _MARGIN
    u = u.clamp_max(0.98)
    near = _MARGIN / scenario.range_min
    far = 1 / (_MARGIN**3 * scenario.range_max)
    low = torch.cat((-u, u.new_tensor([far])))
    return low, torch.cat((u, u.new_tensor([near])))


def refine(
    measurements: Measurements,
    starts: torch.Tensor,
    *,
    steps: int = 5,
    common: bool = False,
    prior: Prior | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move sources downhill from every start by Levenberg-Marquardt.

    (C + lambda diag C) delta = g with curvature C and gradient g of `explain`; a step is kept only
    if it lowers the cost, scene by scene.

    Args:
        measurements: B scenes.
        starts: [B, S, K, 3], (u_x, u_y, 1/r).
        steps: how many steps are tried.
        common: one symbol for all snapshots.
        prior: of the symbols.

    Returns:
        places [B, S, K, 3] and their costs [B, S].
    """
    low, high = (bound.to(starts) for bound in bound_places(measurements.scenario))
    longest = torch.cat((starts.new_tensor(_LONGEST[:2]), _LONGEST[2] * high[2:]))
    longest = longest.repeat(starts.shape[-2])
    places = starts.clamp(low, high)
    now = explain(measurements, places, common=common, prior=prior)
    damping = torch.full_like(now.cost, _DAMPING)
    for step in range(steps):
        move = _solve(now, damping)
        shorten = (move.abs() / longest).amax(-1, keepdim=True).clamp_min(1.0)
        tried = (places + (move / shorten).unflatten(-1, (-1, 3))).clamp(low, high)
        if step == steps - 1:  # nothing follows: the cost alone decides
            cost = weigh_places(measurements, tried, common=common, prior=prior)
            better = cost < now.cost
            return torch.where(better[..., None, None], tried, places), cost.minimum(now.cost)
        then = explain(measurements, tried, common=common, prior=prior)
        better = then.cost < now.cost
        damping = torch.where(better, _EASE * damping, _STIFFEN * damping)
        places = torch.where(better[..., None, None], tried, places)
        now = _choose(better, then, now)
    return places, now.cost


def _solve(now: Explanation, damping: torch.Tensor) -> torch.Tensor:
    """Damped step [B, S, P]; 0 where the curvature is 0."""
    diagonal = now.curvature.diagonal(dim1=-2, dim2=-1)
    least = torch.finfo(diagonal.dtype).eps * diagonal.amax(-1, keepdim=True)
    load = damping[..., None] * diagonal + least.clamp_min(torch.finfo(diagonal.dtype).tiny)
    lower, _ = torch.linalg.cholesky_ex(now.curvature + torch.diag_embed(load))
    move = torch.cholesky_solve(now.gradient[..., None], lower)[..., 0]
    return torch.where(move.isfinite(), move, 0.0)


def _choose(better: torch.Tensor, then: Explanation, now: Explanation) -> Explanation:
    """Take the one or the other, start by start."""
    chosen = {}
    for f in fields(Explanation):
        new, old = getattr(then, f.name), getattr(now, f.name)
        chosen[f.name] = torch.where(better.view(*better.shape, *(1,) * (new.dim() - 2)), new, old)
    return Explanation(**chosen)
