"""Geometry: element positions and near-field steering vectors; one convention.

Radians and metres. A point is (phi, theta, r): azimuth, elevation, range from the array centre.
Its direction is u = (sin phi cos theta, sin theta, cos phi cos theta); the surface lies in z = 0.
Elements are flattened row by row, x fastest.

Shapes: N elements, `...` any leading dimensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ris_model.config import Scenario, Steering

# Least square of D / r. Places that no direction belongs to, |u| > 1, would have a negative one.
_LEAST_STRETCH2 = 1e-4


def place_elements(scenario: Scenario) -> torch.Tensor:
    """Place the elements of the surface, centred exactly on the origin.

    x_h = (h - (N_x - 1)/2) d and y_v = (v - (N_y - 1)/2) d.

    Returns:
        [N, 2] float64, metres.
    """
    x = torch.arange(scenario.columns, dtype=torch.float64) - (scenario.columns - 1) / 2
    y = torch.arange(scenario.rows, dtype=torch.float64) - (scenario.rows - 1) / 2
    y_NN, x_NN = torch.meshgrid(y, x, indexing="ij")
    return scenario.spacing * torch.stack((x_NN.flatten(), y_NN.flatten()), dim=-1)


def point_direction(phi: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """Return the in-plane direction (u_x, u_y) = (sin phi cos theta, sin theta), [..., 2]."""
    return torch.stack((phi.sin() * theta.cos(), theta.sin().expand_as(phi)), dim=-1)


def lengthen_path(
    positions: torch.Tensor,
    points: torch.Tensor,
    *,
    model: Steering = "exact",
) -> torch.Tensor:
    """Path length from a source to each element, less the path to the array centre.

    exact:         D_n - r = (rho^2 - 2 r q) / (D_n + r),  D_n^2 = r^2 - 2 r q + rho^2
    second-order:  D_n - r ~ -q + (rho^2 - q^2) / (2 r)
    with q = x u_x + y u_y and rho^2 = x^2 + y^2. Written as a quotient, because D_n - r cancels
    in float32 at a large range. The -q^2 belongs to the second order: without it the formula
    holds at boresight only. Below about 4 m only the exact form serves a 12 x 12 surface.

    Args:
        positions: [N, 2], metres, or [B, N, 2] with points [B, K, 3].
        points: [..., 3], (phi, theta, r) in rad, rad, metres.
        model: which of the two.

    Returns:
        [..., N] metres, real dtype of `points`.
    """
    u = point_direction(points[..., 0], points[..., 1])
    r = points[..., 2:]
    q = u @ positions.mT
    rho2 = positions.square().sum(-1)
    if positions.dim() > 2:
        rho2 = rho2.unsqueeze(-2)
    if model == "second-order":
        return -q + (rho2 - q.square()) / (2 * r)
    distance = (r.square() - 2 * r * q + rho2).sqrt()
    return (rho2 - 2 * r * q) / (distance + r)


def steer(
    positions: torch.Tensor,
    points: torch.Tensor,
    *,
    wavenumber: float,
    model: Steering = "exact",
) -> torch.Tensor:
    """Near-field steering vectors of unit norm: a_n = exp(-j k0 (D_n - r)) / sqrt(N).

    Args:
        positions: [N, 2], metres, or [B, N, 2] with points [B, K, 3].
        points: [..., 3], (phi, theta, r) in rad, rad, metres.
        wavenumber: k0, rad/m.
        model: exact spherical phase, or its second-order expansion.

    Returns:
        [..., N] complex, of the precision of `points`.
    """
    phase = -wavenumber * lengthen_path(positions, points, model=model)
    return _unit_phasor(phase)


def steer_planar(
    positions: torch.Tensor,
    angles: torch.Tensor,
    *,
    wavenumber: float,
) -> torch.Tensor:
    """Far-field steering vectors of unit norm: a_n = exp(+j k0 (x u_x + y u_y)) / sqrt(N).

    The limit of `steer` for r to infinity.

    Args:
        positions: [N, 2], metres.
        angles: [..., 2], (phi, theta), rad.
        wavenumber: k0, rad/m.

    Returns:
        [..., N] complex, of the precision of `angles`.
    """
    u = point_direction(angles[..., 0], angles[..., 1])
    return _unit_phasor(wavenumber * (u @ positions.mT))


def place_points(points: torch.Tensor) -> torch.Tensor:
    """Return (u_x, u_y, 1/r) of (phi, theta, r) points, [..., 3]; 1/r in 1/m."""
    u = point_direction(points[..., 0], points[..., 1])
    return torch.cat((u, 1.0 / points[..., 2:]), dim=-1)


def name_places(places: torch.Tensor) -> torch.Tensor:
    """Return the (phi, theta, r) of (u_x, u_y, 1/r) places, [..., 3]: inverse of `place_points`.

    theta = asin u_y,  phi = asin(u_x / cos theta), both arguments held to [-1, 1]; r is infinite
    at 1/r = 0.
    """
    theta = places[..., 1].clamp(-1.0, 1.0).asin()
    least = torch.finfo(places.dtype).eps
    phi = (places[..., 0] / theta.cos().clamp_min(least)).clamp(-1.0, 1.0).asin()
    return torch.stack((phi, theta, 1.0 / places[..., 2]), dim=-1)


def steer_places(
    positions: torch.Tensor,
    places: torch.Tensor,
    *,
    wavenumber: float,
    model: Steering = "exact",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Steering vectors of (u_x, u_y, w = 1/r) places, and their derivatives.

    exact:         f = D - r = (w rho^2 - 2 q) / (1 + S),  S = D / r = sqrt(1 - 2 w q + w^2 rho^2)
                   df/du_x = -x / S,  df/du_y = -y / S,
                   df/dw = (rho^2 - f S_w) / (1 + S),  S_w = (w rho^2 - q) / S
    second-order:  f = -q + w (rho^2 - q^2) / 2
    a = exp(-j k0 f) / sqrt(N),  da = -j k0 df a;  valid at w = 0, the far field.

    Args:
        positions: [N, 2], metres, or [B, N, 2] with places [B, ..., 3].
        places: [..., 3], (u_x, u_y, 1/r), the last in 1/m.
        wavenumber: k0, rad/m.
        model: exact spherical phase, or its second-order expansion.

    Returns:
        a [..., N] complex and df [..., 3, N] real, so that da = -j k0 df a.
    """
    if positions.dim() > 2:
        between = (1,) * (places.dim() - 2)
        positions = positions.view(len(positions), *between, *positions.shape[1:])
    x, y = positions.unbind(-1)
    w = places[..., 2:]
    q = places[..., :1] * x + places[..., 1:2] * y
    rho2 = positions.square().sum(-1)
    if model == "second-order":
        path = -q + w * (rho2 - q.square()) / 2
        slope = -(1 + w * q)
        partial = torch.stack((slope * x, slope * y, (rho2 - q.square()) / 2), dim=-2)
    else:
        stretch = (1 - 2 * w * q + w.square() * rho2).clamp_min(_LEAST_STRETCH2).sqrt()
        path = (w * rho2 - 2 * q) / (1 + stretch)
        bend = (rho2 - path * (w * rho2 - q) / stretch) / (1 + stretch)
        partial = torch.stack((-x / stretch, -y / stretch, bend), dim=-2)
    return _unit_phasor(-wavenumber * path), partial


def _unit_phasor(phase: torch.Tensor) -> torch.Tensor:
    """exp(j phase) / sqrt(N) over the last dimension."""
    return torch.polar(torch.full_like(phase, phase.shape[-1] ** -0.5), phase)
