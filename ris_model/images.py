"""Images: what the snapshots say of every cell, by physics alone; nothing here is learnt.

Whitening turns the channel into a nearly orthogonal one, the adjoint sends the snapshots back to
the surface, and an image is the energy that a source in each cell would explain.

Everything is done in at least FP32 with autocast off: the energies span more than FP16 holds.

Shapes: B scenes, L snapshots, M antennas, N elements, G cells, C images.
"""

from __future__ import annotations

import torch
from torch import nn

from ris_model.cells import Cells
from ris_model.config import DetectorSize, Scenario
from ris_model.covariance import read_trace
from ris_model.geometry import place_elements, steer
from ris_model.linalg import at_least_fp32, factorise, hermitise

# Keeps quotients finite where a scene, an image or an illumination is 0.
_LEAST = 1e-12
# Least spread that an image is divided by; real ones are of order 1.
_LEAST_SPREAD = 1e-6


def whiten(
    y: torch.Tensor,
    h: torch.Tensor,
    *,
    ridge: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whiten snapshots and channel: C^-1 y_l and V = C^-1 H, C C^H = H H^H + ridge t I.

    t = tr(H H^H) / M. |c_n| = 1, so Phi_l Phi_l^H = H H^H for every snapshot's Phi_l =
    H diag(c_l): one Cholesky factor per scene.

    Args:
        y: [B, L, M] snapshots.
        h: [B, M, N] channel.
        ridge: relative regularisation.

    Returns:
        [B, L, M] and [B, M, N] complex.
    """
    gram_BMM = hermitise(h @ h.mH)
    side = gram_BMM.shape[-1]
    load = (ridge * read_trace(gram_BMM) / side).clamp_min(_LEAST)
    eye = torch.eye(side, dtype=h.dtype, device=h.device)
    lower = factorise(gram_BMM + load * eye)
    white = torch.linalg.solve_triangular(lower, torch.cat((y.mT, h), dim=-1), upper=False)
    snapshots = y.shape[-2]
    return white[..., :snapshots].mT, white[..., snapshots:]


def project_back(
    y: torch.Tensor,
    h: torch.Tensor,
    codes: torch.Tensor,
    *,
    ridge: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Send the snapshots back: x_l = conj(c_l) o H^H (H H^H + ridge t I)^-1 y_l.

    Args:
        y: [B, L, M] snapshots.
        h: [B, M, N] channel.
        codes: [B, L, N] unit-modulus codes.
        ridge: relative regularisation.

    Returns:
        x [B, L, N] and the whitened channel V [B, M, N].
    """
    white_BLM, v_BMN = whiten(y, h, ridge=ridge)
    return codes.conj() * (white_BLM @ v_BMN.conj()), v_BMN


def sharpen(x: torch.Tensor, *, loading: float) -> torch.Tensor:
    """Return F with ||F a||^2 = a^H X^T (X^* X^T + load I)^-1 X^* a, rows of X the x_l.

    A Capon-like image that parts two sources; load = loading times the mean of the diagonal.
    """
    lower = _load_inner(x, loading=loading)
    sharp: torch.Tensor = torch.linalg.solve_triangular(lower, x.conj(), upper=False)
    return sharp


def _load_inner(x: torch.Tensor, *, loading: float) -> torch.Tensor:
    """Cholesky factor of X^* X^T + load I, [B, L, L]."""
    inner_BLL = hermitise(x.conj() @ x.mT)
    side = inner_BLL.shape[-1]
    load = (loading * read_trace(inner_BLL) / side).clamp_min(_LEAST)
    eye = torch.eye(side, dtype=x.dtype, device=x.device)
    return factorise(inner_BLL + load * eye)


def illuminate(v: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return Q with a^H Q a = sum_l ||V diag(c_l) a||^2, [B, N, N]: what arrives from a place.

    Q = (V^H V) o (sum_l conj(c_l) c_l^T)
    """
    return (v.mH @ v) * (codes.mH @ codes)


class Imaging(nn.Module):
    """Images of a batch on the cells, [B, C, planes, rows, columns], standardised.

    A Hermitian form a^H R a is linear in R: with conj(a_n) a_m = c_nm + j s_nm it equals
    sum (c - s) (Re R + Im R), because c and Re R are symmetric, s and Im R are not. One real
    product with the table c - s [N^2, G] weighs all images of all scenes. Where that table would
    be large, the energies |F a|^2 are summed instead.
    """

    def __init__(self, scenario: Scenario, size: DetectorSize, cells: Cells) -> None:
        super().__init__()
        self.size = size
        self.shape = tuple(reversed(cells.counts))
        positions = place_elements(scenario)
        points = cells.resolve(cells.list_coordinates(positions))
        a_GN = steer(positions, points, wavenumber=scenario.wavenumber, model=scenario.steering)
        if size.illuminated:
            outer_GNN = a_GN.conj()[:, :, None] * a_GN[:, None, :]
            table = (outer_GNN.real - outer_GNN.imag).flatten(1).mT.contiguous()
        else:
            table = a_GN.mT.contiguous()
        single = torch.complex64 if table.is_complex() else torch.float32
        # derived from the configuration: a checkpoint has no need of it
        self.register_buffer("table", table.to(single), persistent=False)
        self.table: torch.Tensor

    def forward(
        self,
        y: torch.Tensor,
        h: torch.Tensor,
        codes: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the images and the logarithms of their means and maxima, [B, 2 C]."""
        with torch.no_grad(), torch.autocast(y.device.type, enabled=False):
            energy_BCG = self.measure(at_least_fp32(y), at_least_fp32(h), at_least_fp32(codes))
            level = torch.cat((energy_BCG.mean(-1), energy_BCG.amax(-1)), dim=-1)
            image = energy_BCG.sqrt()
            centred = image - image.mean(-1, keepdim=True)
            spread = centred.square().mean(-1, keepdim=True).sqrt()
            image = centred / spread.clamp_min(_LEAST_SPREAD)
            return image.unflatten(-1, self.shape), level.clamp_min(_LEAST).log()

    def measure(self, y: torch.Tensor, h: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Return the energies of all images, [B, C, G]; snapshots are scaled to level 1 first."""
        level = y.abs().square().mean(dim=(-2, -1), keepdim=True).clamp_min(_LEAST).sqrt()
        back = [project_back(y / level, h, codes, ridge=ridge) for ridge in self.size.ridges]
        last, loading = back[-1][0], self.size.capon_loading
        if not self.size.illuminated:
            table = self.table.to(y.dtype)
            fields = [x.conj() @ table for x, _ in back]
            # the sharpened rows are combinations of the last ones: one product less with the table
            lower = _load_inner(last, loading=loading)
            fields.append(torch.linalg.solve_triangular(lower, fields[-1], upper=False))
            return torch.stack([_sum_energies(field) for field in fields], dim=1)
        factors = [x.conj() for x, _ in back] + [sharpen(last, loading=loading)]
        forms = [f.mH @ f for f in factors] + [illuminate(v, codes) for _, v in back]
        found = self._weigh_forms(torch.stack(forms, dim=1)).clamp_min(0.0)
        ridges = len(back)
        light = found[:, ridges + 1 :]
        light = light.clamp_min(_LEAST_SPREAD * light.amax(-1, keepdim=True) + _LEAST)
        return torch.cat((found[:, : ridges + 1], found[:, :ridges] / light), dim=1)

    def _weigh_forms(self, forms: torch.Tensor) -> torch.Tensor:
        """a_g^H R a_g of [B, C, N, N] Hermitian forms, [B, C, G]."""
        return (forms.real + forms.imag).flatten(2) @ self.table.to(forms.real.dtype)


def _sum_energies(field_BLG: torch.Tensor) -> torch.Tensor:
    """Energies over the snapshots, [B, G] from [B, L, G]."""
    # the two parts apart: a sum over the innermost pair would be four times slower
    return (field_BLG.real.square() + field_BLG.imag.square()).sum(-2)
