"""Bound: how accurate an unbiased estimate of a scene can be at best.

Shapes: B scenes, L snapshots, M antennas, N elements, K sources, P = 3 K.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ris_model.config import Scenario
from ris_model.data import Batch
from ris_model.estimate.field import Measurements, explain, lay_out_batch
from ris_model.geometry import place_points


def bound_covariance(
    measurements: Measurements,
    places: torch.Tensor,
    symbols: torch.Tensor,
    *,
    noise: torch.Tensor,
    common: bool = False,
) -> torch.Tensor:
    """Cramer-Rao bound of (u_x, u_y, 1/r) of K sources, symbols unknown but not random.

    C = (sigma^2 / 2) [Re sum_l conj(s_lk) s_lk' D_lk^H P_l D_lk']^-1

    Stoica and Nehorai (IEEE Trans. ASSP 37, 1989) for one response per snapshot; the matrix is the
    curvature that the fit walks on, at the true symbols.

    Args:
        measurements: B scenes, of which only channel and codes count.
        places: [B, K, 3].
        symbols: [B, L, K], of which the first alone counts when common.
        noise: [B] sigma^2.
        common: one symbol for all snapshots, known to be so.

    Returns:
        [B, P, P] float64, sources in turn.
    """
    exact = widen(measurements)
    places, symbols = places.double(), symbols.to(torch.complex128)
    if common:
        symbols = symbols[:, :1].expand_as(symbols)
    fields = exact.respond(exact.steer(places))
    clean = replace(exact, y=(fields * symbols.mT[:, :, None]).sum(1))
    curvature = explain(clean, places[:, None], common=common).curvature[:, 0]
    inverse: torch.Tensor = torch.linalg.inv(curvature)
    return inverse * (noise.double() / 2)[:, None, None]


def bound_points(covariance: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Carry a covariance over to (phi, theta, r): standard deviations [B, K, 3] in rad, rad, m.

    With J = d(u_x, u_y, 1/r) / d(phi, theta, r) of each source, C -> J^-1 C J^-T.

    Args:
        covariance: [B, P, P] of (u_x, u_y, 1/r).
        places: [B, K, 3].
    """
    x, y, w = places.double().unbind(-1)
    cos_theta = (1 - y.square()).clamp_min(torch.finfo(y.dtype).eps).sqrt()
    sin_phi = (x / cos_theta).clamp(-1.0, 1.0)
    cos_phi = (1 - sin_phi.square()).clamp_min(torch.finfo(y.dtype).eps).sqrt()
    zero = torch.zeros_like(x)
    rows = (
        (cos_phi * cos_theta, -sin_phi * y, zero),
        (zero, cos_theta, zero),
        (zero, zero, -w.square()),
    )
    slopes = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
    blocks = covariance.unflatten(-1, (-1, 3)).unflatten(-3, (-1, 3))
    own = blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # [B, K, 3, 3]
    back = torch.linalg.inv(slopes)
    carried = back @ own @ back.mT
    sigma: torch.Tensor = carried.diagonal(dim1=-2, dim2=-1).sqrt()
    return sigma


def bound_batch(batch: Batch, scenario: Scenario, *, sources: int) -> torch.Tensor:
    """Standard deviations [B, K, 3] (rad, rad, m) that scenes of K sources allow at best.

    Of the nominal surface and what the receiver takes for channel and codes. Scenes of coherent
    sources are bounded as if that were not known.
    """
    places = place_points(batch.points[:, :sources].double())
    covariance = bound_covariance(
        lay_out_batch(batch, scenario),
        places,
        batch.symbols[..., :sources],
        noise=batch.noise_variance,
    )
    return bound_points(covariance, places)


def widen(measurements: Measurements) -> Measurements:
    """Return the measurements in double precision."""
    kinds = {torch.complex64: torch.complex128, torch.float32: torch.float64}
    names = ("y", "h", "codes", "operator", "positions")
    parts = ((name, getattr(measurements, name)) for name in names)
    return replace(
        measurements, **{name: part.to(kinds.get(part.dtype, part.dtype)) for name, part in parts}
    )
