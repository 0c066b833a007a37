"""Terms that both profiles share: a view of a prediction beside its labels in, a scalar out.

What the profiles differ in is what their views hold: which covariance, which points. Nothing here
names a dtype; views are in at least FP32 / complex64, FP64 stays FP64.

Shapes: B scenes, N elements, K source slots (K_MAX), G stencil points.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional

from ris_model.config import Config
from ris_model.covariance import load_diagonal
from ris_model.data import Batch
from ris_model.geometry import place_elements, steer
from ris_model.linalg import at_least_fp32, hermitise
from ris_model.losses.matching import compare_points, wrap_angle
from ris_model.network import Detection, Prediction

Record = TypeVar("Record", Prediction, Detection, Batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A prediction beside its labels, with the matching that terms share."""

    batch: Batch
    r_spectral: torch.Tensor  # [B, *, *] with the K + 1 largest eigenvalues of R_hat at trace 1
    factors: torch.Tensor  # [B, N, K] columns that are to lie in the signal subspace
    factor_angle: torch.Tensor  # [B, N, K] columns that depend on the predicted angles
    factor_range: torch.Tensor  # [B, N, K] columns that depend on the predicted ranges
    gram: torch.Tensor  # [.., K, K] what the Gram matrix of factor_angle is to be
    matched: torch.Tensor  # [B, K, 3] predicted slot of each true source, padded by any slot
    k_logits: torch.Tensor  # [B, K] class c means c + 1 sources

    @property
    def active(self) -> torch.Tensor:
        """Which true slots hold a source, [B, K] in the precision of the loss."""
        return self.batch.active.to(self.r_spectral.real.dtype)

    def average(self, per_source: torch.Tensor) -> torch.Tensor:
        """Mean over the sources of a scene, then over scenes: [B, K] to a scalar."""
        return ((per_source * self.active).sum(-1) / self.batch.count).mean()


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseComparison(Comparison):
    """A comparison whose covariances are whole matrices."""

    r_hat: torch.Tensor  # [B, N, N] predicted covariance at trace 1
    r_pred: torch.Tensor  # [B, N, N] effective covariance of the predicted one alone
    r_blend: torch.Tensor  # [B, N, N] predicted one blended with the sample covariance, trace N
    r_effective: torch.Tensor  # [B, N, N] effective covariance of R_blend
    r_target: torch.Tensor  # [B, N, N] R_true, shrunk, trace N


def lift(record: Record) -> Record:
    """Return the record with every tensor in at least FP32 / complex64."""
    lifted = {field.name: at_least_fp32(getattr(record, field.name)) for field in fields(record)}
    return replace(record, **lifted)


def measure_energy(matrix: torch.Tensor) -> torch.Tensor:
    """Squared Frobenius norm of a complex [..., N, K]."""
    return torch.view_as_real(matrix.resolve_conj()).square().sum((-3, -2, -1))


def _spectral_gap(values: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """l_K - l_(K+1) for ascending eigenvalues [B, N] and K [B]."""
    falling = values.flip(-1)
    above = falling.gather(-1, count[:, None] - 1)
    below = falling.gather(-1, count[:, None])
    return (above - below)[:, 0]


class Term(nn.Module):
    """A loss term: a comparison in, a scalar out."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def steer(self, points: torch.Tensor) -> torch.Tensor:
        """Steering vectors of [..., 3] points in their own precision, [..., N]."""
        world = self.config.scenario
        positions = place_elements(world).to(points)
        return steer(positions, points, wavenumber=world.wavenumber, model=world.steering)


class Covariance(Term):
    """||R_e - R_t||_F^2 / ||R_t||_F^2 with R_e of the blend."""

    def forward(self, view: DenseComparison) -> torch.Tensor:
        """Mean over scenes."""
        return (
            measure_energy(view.r_effective - view.r_target) / measure_energy(view.r_target)
        ).mean()


class PredictedCovariance(Term):
    """The same for R_pred alone, so that the network cannot hide behind the samples."""

    def forward(self, view: DenseComparison) -> torch.Tensor:
        """Mean over scenes."""
        return (measure_energy(view.r_pred - view.r_target) / measure_energy(view.r_target)).mean()


class Orthogonality(Term):
    """||A^H A - G||_F^2 over the active slots of the angle columns, G what their Gram is to be."""

    def forward(self, view: Comparison) -> torch.Tensor:
        """Mean over scenes."""
        a_BNK = view.factor_angle
        both = view.active[:, :, None] * view.active[:, None, :]
        return measure_energy((a_BNK.mH @ a_BNK - view.gram) * both).mean()


class CrossGram(Term):
    """mean |offdiag(A^H A) - offdiag(B^H B)|^2, A the angle columns, B the range columns."""

    def forward(self, view: Comparison) -> torch.Tensor:
        """Mean over scenes and entries."""
        a_BNK, b_BNK = view.factor_angle, view.factor_range
        difference = a_BNK.mH @ a_BNK - b_BNK.mH @ b_BNK
        slots = difference.shape[-1]
        diagonal = torch.eye(slots, dtype=torch.bool, device=difference.device)
        off = difference.masked_fill(diagonal, 0.0)
        return measure_energy(off).mean() / (slots * (slots - 1))


class Eigengap(Term):
    """relu(0.03 - (l_K - l_(K+1))) on the eigenvalues of R_hat, trace 1."""

    def forward(self, view: Comparison) -> torch.Tensor:
        """Mean over scenes."""
        evals, _ = torch.linalg.eigh(view.r_spectral)
        return functional.relu(0.03 - _spectral_gap(evals, view.batch.count)).mean()


class Margin(Term):
    """relu(0.02 - relu(l_K - l_(K+1))) on R_hat, trace 1."""

    def forward(self, view: Comparison) -> torch.Tensor:
        """Mean over scenes."""
        gap = _spectral_gap(torch.linalg.eigvalsh(view.r_spectral), view.batch.count)
        return functional.relu(0.02 - functional.relu(gap)).mean()


class SourceCount(Term):
    """Label-smoothed (0.05) cross entropy of K, doubled where too few sources are found."""

    def forward(self, view: Comparison) -> torch.Tensor:
        """Mean over scenes."""
        logits, label = view.k_logits, view.batch.count - 1
        entropy = functional.cross_entropy(logits, label, label_smoothing=0.05, reduction="none")
        missed = logits.detach().argmax(-1) < label
        return torch.where(missed, 2 * entropy, entropy).mean()


class Auxiliary(Term):
    """Huber(phi) + 1.5 Huber(theta) + Huber(log r) of the matched slots, rad and m."""

    def forward(self, view: Comparison) -> torch.Tensor:
        """Mean over sources and scenes."""
        return view.average(compare_points(view.matched, view.batch.points))


class Peak(Term):
    """Symmetric Chamfer distance of (phi, theta), rad^2: truths to slots and slots to truths."""

    def forward(self, view: Comparison) -> torch.Tensor:
        """Mean over sources and scenes; the slots are those that were matched to a source."""
        slots, points = view.matched[..., :2], view.batch.points[..., :2]
        distance = wrap_angle(points[:, :, None] - slots[:, None]).square().sum(-1)
        empty = ~view.batch.active
        to_slots = distance.masked_fill(empty[:, None, :], torch.inf).amin(2)
        to_points = distance.masked_fill(empty[:, :, None], torch.inf).amin(1)
        return view.average(to_slots + to_points)


class RangeSpan(Term):
    """((r - r*) / (r_max - r_min))^2 of the matched slots."""

    def forward(self, view: Comparison) -> torch.Tensor:
        """Mean over sources and scenes."""
        world = self.config.scenario
        error = view.matched[..., 2] - view.batch.points[..., 2]
        return view.average((error / (world.range_max - world.range_min)).square())


class TrueSubspace(Term):
    """||P R P||_F^2 / ||R||_F^2 of R_blend, P the projector off the true steering vectors."""

    def forward(self, view: DenseComparison) -> torch.Tensor:
        """Mean over scenes; no eigenvectors, a ridge of 1e-4 on the Gram matrix instead."""
        a_BKN = self.steer(view.batch.points) * view.active[..., None]
        span = a_BKN.mT
        dual = torch.linalg.solve(load_diagonal(span.mH @ span, 1e-4), span.mH)
        # two updates of rank K instead of two products of side N
        left = view.r_blend - span @ (dual @ view.r_blend)
        outside = left - (left @ span) @ dual
        return (measure_energy(outside) / measure_energy(view.r_blend)).mean()


def lay_stencil(points: torch.Tensor) -> torch.Tensor:
    """Return 5 x 5 points around each, +-0.1 rad in phi and theta at its range, [..., 25, 3]."""
    step = torch.linspace(-0.1, 0.1, 5, dtype=points.dtype, device=points.device)
    theta, phi = torch.meshgrid(step, step, indexing="ij")
    stencil = torch.stack((phi, theta, torch.zeros_like(phi)), dim=-1).flatten(0, 1)
    return points[..., None, :] + stencil


class PeakContrast(Term):
    """Cross entropy of -log(a^H R_e^-1 a) / 0.5 over a 5 x 5 stencil around each true source.

    The stencil spans +-0.1 rad in phi and theta at the true range; its centre is the label.
    """

    def forward(self, view: DenseComparison) -> torch.Tensor:
        """Mean over sources and scenes."""
        a_BKGN = self.steer(lay_stencil(view.batch.points))
        slots, cells = a_BKGN.shape[1:3]
        lower = torch.linalg.cholesky(hermitise(view.r_effective))
        white = torch.linalg.solve_triangular(lower, a_BKGN.flatten(1, 2).mT, upper=False)
        spread = (white * white.conj()).real.sum(-2).unflatten(-1, (slots, cells))
        return view.average(-(-spread.log() / 0.5).log_softmax(-1)[..., cells // 2])


SHARED: dict[str, type[Term]] = {
    "cov": Covariance,
    "cov_pred": PredictedCovariance,
    "ortho": Orthogonality,
    "cross": CrossGram,
    "gap": Eigengap,
    "margin": Margin,
    "K": SourceCount,
    "aux": Auxiliary,
    "peak": Peak,
    "range": RangeSpan,
    "subspace_align": TrueSubspace,
    "peak_contrast": PeakContrast,
}
