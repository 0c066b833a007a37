"""Search: which place explains best what the sources found so far leave over.

Shapes: B scenes, L snapshots, M antennas, N elements, K sources, J candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ris_model.cells import Cells
from ris_model.estimate.field import Measurements, Prior, invert, overlap, square

# A candidate of which less than this share is new is one with those found already.
_LEAST_NEW = 1e-3
# Half axes of the ellipsoid in which two candidates are the same peak, cells.
_SHADOW = (1.2, 1.2, 2.0)


@dataclass(frozen=True, slots=True)
class Candidates:
    """Places where sources may be, with what arrives from them."""

    places: torch.Tensor  # [B, J, 3] (u_x, u_y, 1/r)
    rows: torch.Tensor  # [B, J, N] complex, their steering vectors
    own: torch.Tensor  # [B, J, L] squared norm of their responses
    # [B, K_MAX, 3] sources that somebody has seen together, the surest first; none where nobody has
    together: torch.Tensor | None = None

    def select(self, index: torch.Tensor) -> Candidates:
        """Return the scenes of an index or a mask."""
        seen = None if self.together is None else self.together[index]
        return Candidates(self.places[index], self.rows[index], self.own[index], seen)

    def pick(self, scores: torch.Tensor, count: int, cells: Cells) -> torch.Tensor:
        """Pick the best candidates, none in the shadow of a better one, [B, count, 3]."""
        left = scores.clone()
        radius = scores.new_tensor(cells.step) * scores.new_tensor(_SHADOW)
        scene = torch.arange(len(left), device=left.device)
        found = []
        for _ in range(count):
            best = self.places[scene, left.argmax(-1)]
            found.append(best)
            distance = ((self.places - best[:, None]) / radius).square().sum(-1)
            left = left.masked_fill(distance < 1.0, -torch.inf)
        return torch.stack(found, dim=1)


def gather_candidates(
    measurements: Measurements,
    places: torch.Tensor,
    together: torch.Tensor | None = None,
) -> Candidates:
    """Compute what arrives from [B, J, 3] places."""
    rows = measurements.steer(places)
    return Candidates(places, rows, square(measurements.respond(rows)).sum(-2), together)


def score_candidates(
    measurements: Measurements,
    candidates: Candidates,
    fixed: torch.Tensor,
    *,
    common: bool = False,
    prior: Prior | None = None,
) -> torch.Tensor:
    """Score each candidate as one more source beside fixed ones: what the cost falls by.

    sum_l |f_l^H r_l|^2 / f_l^H P_l f_l with the residual r_l and the projector P_l of the fixed
    sources: orthogonal least squares (Chen, Billings and Luo, Int. J. Control 50, 1989). With a
    prior the candidate's power is the mean of the others', and the cost that of `explain`.

    Args:
        measurements: B scenes.
        candidates: J of each scene.
        fixed: [B, K, 3], K may be 0.
        common: one symbol for all snapshots.
        prior: of the fixed sources, [B, K] and [B]; none where K is 0.

    Returns:
        [B, J].
    """
    rows, own = candidates.rows, candidates.own
    if common:
        own = own.sum(-1, keepdim=True)
    if not fixed.shape[1]:
        match = _project(measurements, rows, measurements.y[:, None], common=common)[:, 0]
        return (square(match) / own).sum(-1)
    seen = overlap(measurements, fixed[:, None], common=common)
    starts = None if prior is None else Prior(prior.power[:, None], prior.noise[:, None])
    inverse, _, _ = invert(seen.inner, starts)
    inverse = inverse[:, 0]  # [B, K, K, Z]
    s = (inverse * seen.match).sum(2)
    g = measurements.respond(measurements.steer(fixed))
    left = measurements.y - (g * s[:, :, None]).sum(1)
    found = _project(measurements, rows, torch.cat((g, left[:, None]), 1), common=common)
    shared, match = found[:, :-1], found[:, -1]  # f^H g_k and f^H r, [B, K, J, Z] and [B, J, Z]
    turned = (inverse[:, :, :, None] * shared.conj()[:, None]).sum(2)
    new = own - (shared * turned).real.sum(1)
    new = new.maximum(_LEAST_NEW * own)
    if prior is None:
        return (square(match) / new).sum(-1)
    load = (prior.noise / prior.power.mean(-1))[:, None, None]
    gain = square(match) / (new + load) - prior.noise[:, None, None] * (1 + new / load).log()
    return gain.sum(-1)


def _project(
    measurements: Measurements,
    rows: torch.Tensor,
    fields: torch.Tensor,
    *,
    common: bool,
) -> torch.Tensor:
    """f_jl^H x_cl of candidates' responses and [B, C, M, L] fields, [B, C, J, Z]."""
    back = measurements.send_back(fields)
    if common:
        back = back.sum(-1, keepdim=True)
    projected: torch.Tensor = rows.conj()[:, None] @ back
    return projected
