"""Losses: one module per term in a table; each weighted term apart, their sum is the loss.

Precision: `prepare` raises predictions and labels to at least FP32 / complex64, FP64 stays FP64;
nothing below names a dtype.

Shapes: B scenes, N elements, K source slots (K_MAX), G stencil points.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import TypeVar

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional

from ris_model.config import Config, LossWeights
from ris_model.covariance import (
    choose_shrinkage,
    form_blend,
    form_effective,
    form_predicted,
    load_diagonal,
    shrink,
)
from ris_model.data import Batch
from ris_model.geometry import place_elements, steer
from ris_model.linalg import at_least_fp32, hermitise
from ris_model.network import Prediction

Record = TypeVar("Record", Prediction, Batch)

_ANGLE_DELTA = math.radians(0.25)  # rad, where the Huber loss of an angle turns linear
_RANGE_DELTA = 0.2  # of the logarithm of the range
_THETA_FACTOR = 1.5


@dataclass(frozen=True, slots=True)
class Comparison:
    """A prediction beside its labels, with the covariances and the matching that terms share."""

    prediction: Prediction
    batch: Batch
    r_hat: torch.Tensor  # [B, N, N] F F^H at trace 1
    r_pred: torch.Tensor  # [B, N, N] effective covariance of F F^H alone
    r_blend: torch.Tensor  # [B, N, N] F F^H blended with the sample covariance, trace N
    r_effective: torch.Tensor  # [B, N, N] effective covariance of R_blend
    r_target: torch.Tensor  # [B, N, N] R_true, shrunk, trace N
    matched: torch.Tensor  # [B, K, 3] predicted slot of each true source, padded by any slot

    @property
    def active(self) -> torch.Tensor:
        """Which true slots hold a source, [B, K] in the precision of the loss."""
        return self.batch.active.to(self.r_hat.real.dtype)

    def average(self, per_source: torch.Tensor) -> torch.Tensor:
        """Mean over the sources of a scene, then over scenes: [B, K] to a scalar."""
        return ((per_source * self.active).sum(-1) / self.batch.count).mean()


def prepare(prediction: Prediction, batch: Batch, config: Config) -> Comparison:
    """Lift both sides to at least FP32 and form what the terms share."""
    prediction = _lift(prediction)
    batch = _lift(batch)
    form = config.covariance
    side = prediction.factors.shape[-2]
    r_hat = form_predicted(prediction.factors, trace=1.0)
    r_full = side * r_hat
    r_blend = form_blend(r_full, batch.r_samp, blend=form.blend)
    return Comparison(
        prediction=prediction,
        batch=batch,
        r_hat=r_hat,
        r_pred=form_effective(r_full, batch.snr_db, form=form),
        r_blend=r_blend,
        r_effective=form_effective(r_blend, batch.snr_db, form=form),
        r_target=shrink(batch.r_true, choose_shrinkage(batch.snr_db, form)),
        matched=match_slots(prediction.slots, batch),
    )


def _lift(record: Record) -> Record:
    """Return the record with every tensor in at least FP32 / complex64."""
    lifted = {field.name: at_least_fp32(getattr(record, field.name)) for field in fields(record)}
    return replace(record, **lifted)


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

    The assignment is found on detached values; the gradient goes through the slots.

    Returns:
        [B, K, 3] slots in the order of the true sources.
    """
    cost = compare_points(slots.detach()[:, None], batch.points[:, :, None])
    table = cost.double().cpu().numpy()
    counts = batch.count.tolist()
    order = np.zeros(table.shape[:2], dtype=np.int64)
    for scene, sources in enumerate(counts):
        _, order[scene, :sources] = linear_sum_assignment(table[scene, :sources])
    index = torch.from_numpy(order).to(slots.device)
    return slots.gather(1, index[..., None].expand(-1, -1, 3))


def _huber(error: torch.Tensor, delta: float) -> torch.Tensor:
    """Element-wise Huber loss of an error."""
    return functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=delta)


def _energy(matrix: torch.Tensor) -> torch.Tensor:
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

    def forward(self, view: Comparison) -> torch.Tensor:
        """Mean over scenes."""
        return (_energy(view.r_effective - view.r_target) / _energy(view.r_target)).mean()


class PredictedCovariance(Term):
    """The same for R_pred alone, so that the network cannot hide behind the samples."""

    def forward(self, view: Comparison) -> torch.Tensor:
        """Mean over scenes."""
        return (_energy(view.r_pred - view.r_target) / _energy(view.r_target)).mean()


class Orthogonality(Term):
    """||A^H A - I||_F^2 over the active slots of the raw angle factors.

    Before the QR retraction: after it the term is 0 whatever the network says.
    """

    def forward(self, view: Comparison) -> torch.Tensor:
        """Mean over scenes."""
        a_BNK = view.prediction.factor_angle
        eye = torch.eye(a_BNK.shape[-1], dtype=a_BNK.dtype, device=a_BNK.device)
        both = view.active[:, :, None] * view.active[:, None, :]
        return _energy((a_BNK.mH @ a_BNK - eye) * both).mean()


class CrossGram(Term):
    """mean |offdiag(A^H A) - offdiag(B^H B)|^2, A the raw angle factors, B the range factors."""

    def forward(self, view: Comparison) -> torch.Tensor:
        """Mean over scenes and entries."""
        a_BNK, b_BNK = view.prediction.factor_angle, view.prediction.factor_range
        difference = a_BNK.mH @ a_BNK - b_BNK.mH @ b_BNK
        slots = difference.shape[-1]
        diagonal = torch.eye(slots, dtype=torch.bool, device=difference.device)
        off = difference.masked_fill(diagonal, 0.0)
        return _energy(off).mean() / (slots * (slots - 1))


class Eigengap(Term):
    """relu(0.03 - (l_K - l_(K+1))) on the eigenvalues of R_hat, trace 1."""

    def forward(self, view: Comparison) -> torch.Tensor:
        """Mean over scenes."""
        evals, _ = torch.linalg.eigh(view.r_hat)
        return functional.relu(0.03 - _spectral_gap(evals, view.batch.count)).mean()


class Margin(Term):
    """relu(0.02 - relu(l_K - l_(K+1))) on R_hat, trace 1."""

    def forward(self, view: Comparison) -> torch.Tensor:
        """Mean over scenes."""
        gap = _spectral_gap(torch.linalg.eigvalsh(view.r_hat), view.batch.count)
        return functional.relu(0.02 - functional.relu(gap)).mean()


class SourceCount(Term):
    """Label-smoothed (0.05) cross entropy of K, doubled where too few sources are found."""

    def forward(self, view: Comparison) -> torch.Tensor:
        """Mean over scenes."""
        logits, label = view.prediction.k_logits, view.batch.count - 1
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


class Alignment(Term):
    """||(I - P_sig) F||^2 / ||F||^2, P_sig from the top-K eigenvectors of R_hat, trace 1.

    As the case report had it. R_hat has rank K_MAX, its loaded null eigenvalues are equal to the
    last bit, and the gradient of `eigh` divides by their differences: NaN from a finite loss.
    `linalg.project_signal` is the projector whose gradient is defined.
    """

    def forward(self, view: Comparison) -> torch.Tensor:
        """Mean over scenes."""
        factors = view.prediction.factors
        loaded = load_diagonal(view.r_hat, self.config.covariance.align_loading)
        _, vectors = torch.linalg.eigh(loaded)
        side = vectors.shape[-1]
        rank = torch.arange(side, device=vectors.device)
        top = vectors * (rank >= side - view.batch.count[:, None])[:, None, :]
        outside = factors - top @ (top.mH @ factors)
        return (_energy(outside) / _energy(factors)).mean()


class TrueSubspace(Term):
    """||P R P||_F^2 / ||R||_F^2 of R_blend, P the projector off the true steering vectors."""

    def forward(self, view: Comparison) -> torch.Tensor:
        """Mean over scenes; no eigenvectors, a ridge of 1e-4 on the Gram matrix instead."""
        a_BKN = self.steer(view.batch.points) * view.active[..., None]
        ridge = load_diagonal(a_BKN.conj() @ a_BKN.mT, 1e-4)
        inside = a_BKN.mT @ torch.linalg.solve(ridge, a_BKN.conj())
        off = torch.eye(inside.shape[-1], dtype=inside.dtype, device=inside.device) - inside
        return (_energy(off @ view.r_blend @ off) / _energy(view.r_blend)).mean()


class PeakContrast(Term):
    """Cross entropy of -log(a^H R_e^-1 a) / 0.5 over a 5 x 5 stencil around each true source.

    The stencil spans +-0.1 rad in phi and theta at the true range; its centre is the label.
    """

    def forward(self, view: Comparison) -> torch.Tensor:
        """Mean over sources and scenes."""
        points = view.batch.points
        step = torch.linspace(-0.1, 0.1, 5, dtype=points.dtype, device=points.device)
        theta, phi = torch.meshgrid(step, step, indexing="ij")
        stencil = torch.stack((phi, theta, torch.zeros_like(phi)), dim=-1).flatten(0, 1)
        a_BKGN = self.steer(points[:, :, None] + stencil)
        slots, cells = a_BKGN.shape[1:3]
        lower = torch.linalg.cholesky(hermitise(view.r_effective))
        white = torch.linalg.solve_triangular(lower, a_BKGN.flatten(1, 2).mT, upper=False)
        spread = (white * white.conj()).real.sum(-2).unflatten(-1, (slots, cells))
        return view.average(-(-spread.log() / 0.5).log_softmax(-1)[..., cells // 2])


TERMS: dict[str, type[Term]] = {
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
    "align": Alignment,
    "subspace_align": TrueSubspace,
    "peak_contrast": PeakContrast,
}


class Objective(nn.Module):
    """All terms and their live weights, which are one frozen record."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.weights = config.weights
        self.terms = nn.ModuleDict({name: term(config) for name, term in TERMS.items()})

    def forward(self, prediction: Prediction, batch: Batch) -> dict[str, torch.Tensor]:
        """Weighted terms by name; their sum is the loss. Weight 0: the term is not built."""
        view = prepare(prediction, batch, self.config)
        return {
            name: weight * self.terms[name](view)
            for name in TERMS
            if (weight := getattr(self.weights, f"lam_{name}")) != 0
        }

    def list_weights(self) -> dict[str, float]:
        """Read the weights as this objective holds them now."""
        return asdict(self.weights)

    def reweight(self, name: str, value: float) -> None:
        """Set one weight; a ValueError lists the known names."""
        known = [field.name for field in fields(LossWeights)]
        if name not in known:
            msg = f"there is no weight {name!r}; choose one of {', '.join(known)}"
            raise ValueError(msg)
        self.weights = replace(self.weights, **{name: float(value)})
