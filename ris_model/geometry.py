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
        positions: [N, 2], metres.
        points: [..., 3], (phi, theta, r) in rad, rad, metres.
        model: which of the two.

    Returns:
        [..., N] metres, real dtype of `points`.
    """
    u = point_direction(points[..., 0], points[..., 1])
    r = points[..., 2:]
    q = u @ positions.mT
    rho2 = positions.square().sum(-1)
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
        positions: [N, 2], metres.
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


def _unit_phasor(phase: torch.Tensor) -> torch.Tensor:
    """exp(j phase) / sqrt(N) over the last dimension."""
    return torch.polar(torch.full_like(phase, phase.shape[-1] ** -0.5), phase)
