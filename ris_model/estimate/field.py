"""Field: what sources at given places do to the snapshots, and how well they explain them.

Snapshots stand last, so that what is small for each of them is still one long vector.

Shapes: B scenes, S starts per scene, L snapshots, M antennas, N elements, K sources, P = 3 K.
Z is L, or 1 where one symbol serves all snapshots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ris_model.config import Scenario
from ris_model.data import Batch
from ris_model.geometry import place_elements, steer_places

# Roundings of the mean energy of the columns that are added to the diagonal of G^H G, so that
# sources that coincide can be solved for.
_ROUNDINGS = 8


@dataclass(frozen=True, slots=True)
class Measurements:
    """Scenes as the receiver has them, laid out for products with many sources."""

    y: torch.Tensor  # [B, M, L] complex
    h: torch.Tensor  # [B, M, N] complex
    codes: torch.Tensor  # [B, N, L] complex
    operator: torch.Tensor  # [B, N, M L] complex, H diag(c_l) for every snapshot
    positions: torch.Tensor  # [N, 2] m, nominal, or [B, N, 2] as they were found to be
    scenario: Scenario

    @property
    def scenes(self) -> int:
        """B."""
        return self.y.shape[0]

    @property
    def numbers(self) -> int:
        """L M, complex numbers of a scene."""
        return self.y.shape[1] * self.y.shape[2]

    @property
    def energy(self) -> torch.Tensor:
        """Squared norm of the snapshots of each scene, [B]."""
        return square(self.y).sum((-2, -1))

    def select(self, index: torch.Tensor) -> Measurements:
        """Return the scenes of an index or a mask."""
        return replace(
            self,
            y=self.y[index],
            h=self.h[index],
            codes=self.codes[index],
            operator=self.operator[index],
            positions=self.positions if self.positions.dim() == 2 else self.positions[index],
        )

    def respond(self, rows: torch.Tensor) -> torch.Tensor:
        """H diag(c_l) a for [B, C, N] surface fields a, [B, C, M, L]."""
        fields: torch.Tensor = (rows @ self.operator).unflatten(-1, self.y.shape[1:])
        return fields

    def send_back(self, fields: torch.Tensor) -> torch.Tensor:
        """diag(c_l)^H H^H f_l for [B, C, M, L] station fields, [B, C, N, L]: the adjoint."""
        back: torch.Tensor = self.h.mH[:, None] @ fields
        return back * self.codes.conj()[:, None]

    def steer(self, places: torch.Tensor) -> torch.Tensor:
        """Steering vectors [..., N] of (u_x, u_y, 1/r) places."""
        return self._steer(places)[0]

    def differentiate(self, places: torch.Tensor) -> torch.Tensor:
        """Columns a_k, then da_k/dp of each source in turn, [..., 4 K, N] from [..., K, 3]."""
        a, partial = self._steer(places)
        slope = -1j * self.scenario.wavenumber * partial * a[..., None, :]
        return torch.cat((a, slope.flatten(-3, -2)), dim=-2)

    def _steer(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Steering vectors and the derivatives of their paths."""
        world = self.scenario
        return steer_places(
            self.positions, places, wavenumber=world.wavenumber, model=world.steering
        )


def lay_out(
    y: torch.Tensor,
    h: torch.Tensor,
    codes: torch.Tensor,
    scenario: Scenario,
) -> Measurements:
    """Lay out scenes, [B, L, M], [B, M, N] and [B, L, N]; FP64 stays FP64."""
    shown = codes.mT.contiguous()
    operator = (h.mT[..., None] * shown[:, :, None, :]).flatten(2)
    positions = place_elements(scenario).to(device=y.device, dtype=y.real.dtype)
    return Measurements(y.mT.contiguous(), h, shown, operator, positions, scenario)


def lay_out_batch(batch: Batch, scenario: Scenario) -> Measurements:
    """Lay out a batch as its receiver sees it."""
    return lay_out(batch.y, batch.h, batch.codes, scenario)


@dataclass(frozen=True, slots=True)
class Prior:
    """What is believed of the symbols: s_lk ~ CN(0, P_k), noise sigma^2; [B, S, K] and [B, S]."""

    power: torch.Tensor
    noise: torch.Tensor

    @property
    def load(self) -> torch.Tensor:
        """sigma^2 / P_k, [B, S, K]."""
        return self.noise[..., None] / self.power


@dataclass(frozen=True, slots=True)
class Overlaps:
    """Inner products of the responses of sources with each other and with the snapshots."""

    inner: torch.Tensor  # [B, S, K, K, Z] G_l^H G_l
    match: torch.Tensor  # [B, S, K, Z] G_l^H y_l
    energy: torch.Tensor  # [B, 1] sum |y|^2


@dataclass(frozen=True, slots=True)
class Explanation:
    """How places explain the snapshots, to second order; every tensor has B, S in front."""

    cost: torch.Tensor  # [] what is minimised, in units of energy
    gradient: torch.Tensor  # [P], minus half the derivative of the cost
    curvature: torch.Tensor  # [P, P], half the Gauss-Newton Hessian


def explain(
    measurements: Measurements,
    places: torch.Tensor,
    *,
    common: bool = False,
    prior: Prior | None = None,
) -> Explanation:
    """Explain the snapshots by sources at places, the symbols being whatever fits best.

    s_l = (G_l^H G_l + C)^-1 G_l^H y_l,  cost = sum_l |y_l - G_l s_l|^2 + s_l^H C s_l, with C = 0:
    variable projection (Golub and Pereyra, SIAM J. Numer. Anal. 10, 1973); the Hessian is that of
    Kaufman (BIT 15, 1975), Re sum_l conj(s_lk) s_lk' D_lk^H P_l D_lk', P_l the projector off G_l,
    D_l the derivatives of G_l.

    With a prior C = diag(sigma^2 / P_k), and sigma^2 sum_l log det(I + P G_l^H G_l / sigma^2) is
    added: sigma^2 times minus the logarithm of the likelihood with the symbols integrated out.

    Args:
        measurements: B scenes.
        places: [B, S, K, 3], (u_x, u_y, 1/r) in 1, 1, 1/m.
        common: one symbol for all snapshots (coherent in time), not one for each.
        prior: of the symbols; none for maximum likelihood.

    Returns:
        Cost and derivatives, in the precision of the measurements.
    """
    k = places.shape[-2]
    rows = measurements.differentiate(places)
    fields = measurements.respond(rows.flatten(1, 2)).unflatten(1, rows.shape[1:3])
    g, d = fields[:, :, :k], fields[:, :, k:]
    y = measurements.y[:, None]
    gram = (g.conj().unsqueeze(3) * fields.unsqueeze(2)).sum(-2)  # [B, S, K, 4K, L]
    match = (g.conj() * y.unsqueeze(2)).sum(-2)
    if common:
        gram, match = gram.sum(-1, keepdim=True), match.sum(-1, keepdim=True)
    inverse, det, load = invert(gram[:, :, :, :k], prior)
    s = (inverse * match.unsqueeze(2)).sum(3)  # [B, S, K, Z]
    left = y - (g * s.unsqueeze(-2)).sum(2)
    cost = square(left).sum((-2, -1)) + (load * square(s)).sum((-2, -1))
    slope = d.unflatten(2, (k, 3)) * s[:, :, :, None, None, :]
    slope_real = _as_real(slope.flatten(2, 3).flatten(3))  # [B, S, P, 2 M L]
    gradient = (slope_real @ _as_real(left.flatten(2))[..., None])[..., 0]
    cross = gram[:, :, :, k:]
    shared = cross * s.repeat_interleave(3, 2).unsqueeze(2)  # G^H D s, [B, S, K, P, Z]
    turned = (inverse.unsqueeze(4) * shared.unsqueeze(2)).sum(3)
    inside = _as_real(shared.transpose(2, 3).flatten(3))
    outside = _as_real(turned.transpose(2, 3).flatten(3))
    curvature = slope_real @ slope_real.mT - inside @ outside.mT
    if prior is not None:
        cost = cost + prior.noise * (det.log().sum(-1) - load.log().sum((-2, -1)))
        own = inverse.transpose(2, 3).unsqueeze(4) * cross.unflatten(3, (k, 3))
        gradient = gradient - prior.noise[..., None] * own.real.sum((2, -1)).flatten(2)
    return Explanation(cost, gradient, curvature)


def weigh_places(
    measurements: Measurements,
    places: torch.Tensor,
    *,
    common: bool = False,
    prior: Prior | None = None,
) -> torch.Tensor:
    """Return the cost of `explain` alone, [B, S], at a quarter of the work."""
    rows = measurements.steer(places)
    g = measurements.respond(rows.flatten(1, 2)).unflatten(1, rows.shape[1:3])
    seen = _multiply(measurements, g, common=common)
    inverse, det, load = invert(seen.inner, prior)
    s = (inverse * seen.match.unsqueeze(2)).sum(3)
    left = measurements.y[:, None] - (g * s.unsqueeze(-2)).sum(2)
    cost = square(left).sum((-2, -1)) + (load * square(s)).sum((-2, -1))
    if prior is None:
        return cost
    return cost + prior.noise * (det.log().sum(-1) - load.log().sum((-2, -1)))


def overlap(
    measurements: Measurements,
    places: torch.Tensor,
    *,
    common: bool = False,
) -> Overlaps:
    """Inner products for [B, S, K, 3] places, summed over the snapshots where one symbol is."""
    rows = measurements.steer(places)
    g = measurements.respond(rows.flatten(1, 2)).unflatten(1, rows.shape[1:3])
    return _multiply(measurements, g, common=common)


def _multiply(measurements: Measurements, g: torch.Tensor, *, common: bool) -> Overlaps:
    """Inner products of responses [B, S, K, M, L]."""
    inner = (g.conj().unsqueeze(3) * g.unsqueeze(2)).sum(-2)
    match = (g.conj() * measurements.y[:, None, None]).sum(-2)
    if common:
        inner, match = inner.sum(-1, keepdim=True), match.sum(-1, keepdim=True)
    return Overlaps(inner, match, measurements.energy[:, None])


def invert(
    inner: torch.Tensor,
    prior: Prior | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Invert G^H G + C for every snapshot.

    Args:
        inner: [B, S, K, K, Z].
        prior: of the symbols; C is nearly 0 without one.

    Returns:
        inverse [B, S, K, K, Z], determinant [B, S, Z] and the diagonal of C [B, S, K, Z].
    """
    k = inner.shape[2]
    diagonal = inner.diagonal(dim1=2, dim2=3).real.transpose(-2, -1)  # [B, S, K, Z]
    least = _ROUNDINGS * torch.finfo(diagonal.dtype).eps
    load = least * diagonal.mean(2, keepdim=True).expand_as(diagonal)
    if prior is not None:
        load = load + prior.load[..., None]
    if k == 1:
        total = diagonal + load
        return torch.complex(1 / total, torch.zeros_like(total)).unsqueeze(3), total[:, :, 0], load
    if k == 2:
        a, d = (diagonal + load).unbind(2)
        b = inner[:, :, 0, 1]
        det = a * d - square(b)
        rows = torch.stack((d.to(b.dtype), -b, -b.conj(), a.to(b.dtype)), dim=2)
        return (rows / det[:, :, None]).unflatten(2, (2, 2)), det, load
    loaded = inner.movedim(-1, 2) + torch.diag_embed(load.mT).to(inner.dtype)
    lower, _ = torch.linalg.cholesky_ex(loaded)
    det = lower.diagonal(dim1=-2, dim2=-1).real.prod(-1).square()
    return torch.cholesky_inverse(lower).movedim(2, -1), det, load


def square(z: torch.Tensor) -> torch.Tensor:
    """|z|^2, without the root that `abs` takes."""
    return z.real.square() + z.imag.square()


def _as_real(z: torch.Tensor) -> torch.Tensor:
    """Real and imaginary parts side by side, [..., 2 C] from [..., C]."""
    return torch.view_as_real(z.resolve_conj()).flatten(-2)
