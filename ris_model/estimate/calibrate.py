"""Calibrate: where the elements of the surface really are, found together with the sources.

Shapes: B scenes, L snapshots, M antennas, N elements, K sources, P = 3 K + 2 N.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ris_model.estimate.bound import widen
from ris_model.estimate.evidence import weigh_evidence
from ris_model.estimate.field import Measurements, Prior, invert, overlap
from ris_model.estimate.fit import bound_places
from ris_model.geometry import place_elements


def calibrate(
    measurements: Measurements,
    places: torch.Tensor,
    *,
    reach: float,
    steps: int = 2,
    common: bool = False,
) -> tuple[Measurements, torch.Tensor]:
    """Move elements and sources together downhill, elements held near their nominal places.

    cost = sum_l |y_l - G_l s_l|^2 + sigma^2 sum_n |delta_n|^2 / (2 v),  v = reach^2 / 3: maximum
    likelihood for the sources, and a prior of the variance v for the offsets delta_n of all
    elements in x and y, which all snapshots of a scene share. Gauss-Newton on the projected
    residual, as in `field.explain`, with
    d D_n / d x_n = (w x_n - u_x) / S,  d D_n / d y_n = (w y_n - u_y) / S.

    What the offsets do along u_x, u_y and 1/r of a single source cannot be told from the source
    itself; the prior alone decides about that part, and its error stays.

    Args:
        measurements: B scenes.
        places: [B, K, 3] a fit with the surface as it was taken to be.
        reach: offsets are believed to be uniform in +-reach, m.
        steps: of Gauss and Newton.
        common: one symbol for all snapshots.

    Returns:
        The measurements with [B, N, 2] positions, and places [B, K, 3].
    """
    world = measurements.scenario
    nominal = place_elements(world).to(measurements.positions)
    moved = measurements.positions
    if moved.dim() == 2:
        moved = moved.expand(measurements.scenes, -1, -1)
    low, high = (bound.to(places) for bound in bound_places(world))
    variance = reach**2 / 3
    for _ in range(steps):
        now = replace(measurements, positions=moved)
        prior = weigh_evidence(now, places[:, None], common=common, rounds=1).prior
        load = prior.noise[:, 0] / (2 * variance)
        delta = _step(now, places, (moved - nominal).flatten(1), load, common=common, prior=prior)
        sources = 3 * places.shape[1]
        places = (places + delta[:, :sources].unflatten(1, (-1, 3))).clamp(low, high)
        moved = moved + delta[:, sources:].unflatten(1, (-1, 2)).clamp(-reach, reach)
    return replace(measurements, positions=moved), places


def doubt_offsets(measurements: Measurements, *, reach: float) -> torch.Tensor:
    """Minus the logarithm of the prior of the offsets, less a constant, [B]; 0 at nominal."""
    if measurements.positions.dim() == 2:
        return measurements.y.real.new_zeros(measurements.scenes)
    nominal = place_elements(measurements.scenario).to(measurements.positions)
    return (measurements.positions - nominal).square().sum((-2, -1)) / (2 * reach**2 / 3)


def bound_calibrated(
    measurements: Measurements,
    places: torch.Tensor,
    symbols: torch.Tensor,
    *,
    noise: torch.Tensor,
    reach: float,
) -> torch.Tensor:
    """Hybrid Cramer-Rao bound of places where the elements are off by up to `reach`.

    As `bound.bound_covariance` at the nominal surface, with the offsets as further parameters that
    have a prior (Rockah and Schultheiss, IEEE Trans. ASSP 35, 1987): what no fit can go below.

    Args:
        measurements: B scenes, of which only channel and codes count.
        places: [B, K, 3].
        symbols: [B, L, K].
        noise: [B] sigma^2.
        reach: m.

    Returns:
        [B, 3 K, 3 K] float64.
    """
    exact, places = widen(measurements), places.double()
    noise = noise.double()
    fields = exact.respond(exact.steer(places))
    clean = (fields * symbols.to(fields.dtype).mT[:, :, None]).sum(1)
    still = exact.positions.expand(exact.scenes, -1, -1)
    # powers without end are no prior: the symbols are unknown, as in the plain bound
    anything = torch.full_like(places[:, None, :, 0], torch.finfo(torch.float64).max ** 0.5)
    known = replace(exact, y=clean, positions=still)
    prior = Prior(anything, noise[:, None])
    curvature, _ = _linearise(known, places, common=False, prior=prior)
    hold = torch.zeros_like(curvature[..., 0])
    sources = 3 * places.shape[1]
    hold[:, sources:] = (noise / (2 * reach**2 / 3))[:, None]
    inverse: torch.Tensor = torch.linalg.inv(curvature + torch.diag_embed(hold))
    return inverse[:, :sources, :sources] * (noise / 2)[:, None, None]


def _step(
    now: Measurements,
    places: torch.Tensor,
    offsets: torch.Tensor,
    load: torch.Tensor,
    *,
    common: bool,
    prior: Prior,
) -> torch.Tensor:
    """One step of sources [B, 3 K] and offsets [B, 2 N], side by side."""
    curvature, gradient = _linearise(now, places, common=common, prior=prior)
    free = torch.zeros_like(places.flatten(1))
    hold = torch.cat((free, load[:, None].expand_as(offsets)), 1)
    gradient = gradient - hold * torch.cat((free, offsets), 1)
    least = torch.finfo(hold.dtype).eps * curvature.diagonal(dim1=-2, dim2=-1)
    lower, _ = torch.linalg.cholesky_ex(curvature + torch.diag_embed(hold + least))
    move = torch.cholesky_solve(gradient[..., None], lower)[..., 0]
    return torch.where(move.isfinite(), move, 0.0)


def _linearise(
    now: Measurements,
    places: torch.Tensor,
    *,
    common: bool,
    prior: Prior,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Curvature [B, P, P] and gradient [B, P] of the projected residual; no prior of offsets."""
    k = places.shape[1]
    fields = now.respond(now.differentiate(places))
    g, d = fields[:, :k], fields[:, k:]
    seen = overlap(now, places[:, None], common=common)
    inverse, _, _ = invert(seen.inner, prior)
    inverse = inverse[:, 0]
    s = (inverse * seen.match).sum(2)  # [B, K, Z]
    left = now.y - (g * s[:, :, None]).sum(1)
    slope = d * s.repeat_interleave(3, 1)[:, :, None]
    columns = torch.cat((slope, _differentiate_offsets(now, places, s)), dim=1)
    inside = (g.conj()[:, :, None] * columns[:, None]).sum(-2)  # G^H J, [B, K, P, L]
    if common:
        inside = inside.sum(-1, keepdim=True)
    turned = (inverse[:, :, :, None] * inside[:, None]).sum(2)
    hidden = (turned[:, :, :, None] * g[:, :, None]).sum(1)
    free = (columns - hidden).flatten(2)
    real = torch.view_as_real(free).flatten(2)
    gradient = (real @ torch.view_as_real(left.flatten(1)).flatten(1)[..., None])[..., 0]
    return real @ real.mT, gradient


def _differentiate_offsets(
    now: Measurements,
    places: torch.Tensor,
    symbols: torch.Tensor,
) -> torch.Tensor:
    """Derivatives of sum_k G_lk s_lk by the offsets, x and y of each element, [B, 2 N, M, L]."""
    world = now.scenario
    a = now.steer(places)  # [B, K, N]
    x, y = now.positions[:, None].unbind(-1)
    u, v, w = (places[..., i : i + 1] for i in range(3))
    stretch = (1 - 2 * w * (u * x + v * y) + w.square() * (x.square() + y.square())).sqrt()
    slopes = torch.stack(((w * x - u) / stretch, (w * y - v) / stretch), dim=-1)
    rows = -1j * world.wavenumber * slopes * a[..., None]  # [B, K, N, 2]
    weights = (rows[..., None] * symbols[:, :, None, None]).sum(1)  # [B, N, 2, Z]
    operator = now.operator.unflatten(-1, now.y.shape[1:])
    slopes_BPML: torch.Tensor = (operator[:, :, None] * weights[:, :, :, None]).flatten(1, 2)
    return slopes_BPML
