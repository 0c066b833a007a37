"""The sound profile's view of a detection, and the terms that it alone has.

The covariance is built from the geometry of the decoded sources, so every term reads numbers that
the measurements determine, and each has a defined gradient: no eigenvector is differentiated, no
quotient has a predicted norm below it. Of the covariances only what is not a multiple of the
identity is kept (`compact`).

Shapes: B scenes, N elements, G cells, K source slots (K_MAX), m columns of the basis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ris_model.cells import lay_cells
from ris_model.config import Config
from ris_model.covariance import (
    choose_loading,
    choose_shrinkage,
    form_compact,
    invert_snapshots,
    load_diagonal,
)
from ris_model.data import Batch
from ris_model.geometry import place_elements, steer
from ris_model.linalg import hermitise, project_signal, sqrt_or_zero
from ris_model.losses.compact import (
    Compact,
    form_compact_samples,
    form_compact_sources,
    lay_basis,
)
from ris_model.losses.matching import match_slots, pick_slots
from ris_model.losses.terms import (
    SHARED,
    Comparison,
    Term,
    lay_stencil,
    lift,
    measure_energy,
)
from ris_model.network import Detection, decode

# Of the errors of an offset along u_x, u_y, 1/r: the range is the least certain of the three.
_AXIS_WEIGHTS = (1.0, 1.0, 0.5)


# Least energy of the samples that is divided by.
_LEAST = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionComparison(Comparison):
    """A comparison that still holds the heat map, with the cells around each true source.

    What is given in coordinates of the basis is Q^H times the columns.
    """

    detection: Detection
    places: torch.Tensor  # [B, K, 3] coordinates of the true sources, cells
    around: torch.Tensor  # [B, K, 27] flattened cells around them
    share: torch.Tensor  # [B, K, 27] what each is to have of the heat, sum 1 per source
    basis: torch.Tensor  # [B, N, m] of all columns
    turned: torch.Tensor  # [B, m, K] predicted columns in the basis
    true: torch.Tensor  # [B, m, K] true columns in the basis
    r_pred: Compact  # predicted covariance at trace N
    r_blend: Compact  # blended with the sample covariance, trace N
    r_target: Compact  # R_true, shrunk, trace N
    amount: torch.Tensor  # [B] of loading and shrinkage of the effective covariances
    columns: torch.Tensor  # [B, N, *] R_blend is columns columns^H and a multiple of I

    def read_around(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the surrounding cells, [B, K, 27, ...] from [B, G, ...]."""
        index = self.around.flatten(1)
        index = index.view(*index.shape, *(1,) * (values.dim() - 2))
        found = values.gather(1, index.expand(-1, -1, *values.shape[2:]))
        around: torch.Tensor = found.unflatten(1, self.around.shape[1:])
        return around


def prepare_detection(detection: Detection, batch: Batch, config: Config) -> DetectionComparison:
    """Lift both sides to at least FP32, decode, match, and build R from the matched sources.

    R_hat = sum_k p_k a_k a_k^H + sigma^2 I. The angle columns are steering vectors at predicted
    angles and true ranges, the range columns at true angles and predicted ranges: both equal the
    true steering vectors where the prediction is exact.
    """
    detection, batch = lift(detection), lift(batch)
    world, form = config.scenario, config.covariance
    cells = lay_cells(world, config.detector)
    sources = decode(detection, cells, world.sources)
    order = match_slots(sources.points, batch)
    matched = pick_slots(sources.points, order)
    a_BNK, angle, ranges, true = _steer_columns(matched, batch, config)
    power = pick_slots(sources.log_power, order).exp() * batch.active
    noise = detection.log_noise.exp()
    x_BNL = _sample_columns(batch)
    basis = lay_basis((a_BNK, x_BNL, true))
    turned, own, labels = (basis.mH @ part for part in (a_BNK, x_BNL, true))
    side = world.elements
    r_pred = form_compact_sources(turned, power, side=side, noise=noise)
    target = form_compact_sources(labels, batch.power, side=side)
    weight = (1 - form.blend) * side / (power.sum(-1) + side * noise).clamp_min(_LEAST)
    drawn = a_BNK * sqrt_or_zero(weight[:, None] * power)[:, None]
    places = cells.locate(batch.points)
    around, share = cells.surround(places)
    return DetectionComparison(
        batch=batch,
        r_spectral=form_compact(a_BNK.mT, power, noise),
        factors=a_BNK,
        factor_angle=angle,
        factor_range=ranges,
        gram=true.mH @ true,
        matched=matched,
        k_logits=detection.k_logits,
        detection=detection,
        places=places,
        around=around,
        share=share,
        basis=basis,
        turned=turned,
        true=labels,
        r_pred=r_pred,
        r_blend=r_pred.blend(form_compact_samples(own, side=side), form.blend),
        r_target=target.shrink(choose_shrinkage(batch.snr_db, form)),
        amount=choose_loading(batch.snr_db, form),
        columns=torch.cat((drawn, form.blend**0.5 * x_BNL), dim=-1),
    )


def _steer_columns(
    matched: torch.Tensor,
    batch: Batch,
    config: Config,
) -> tuple[torch.Tensor, ...]:
    """Steering vectors of matched, angle, range and true points, four [B, N, K]; 0 where empty."""
    world, truth = config.scenario, batch.points
    mixed = (
        torch.cat((a[..., :2], b[..., 2:]), -1) for a, b in ((matched, truth), (truth, matched))
    )
    stacked = torch.stack((matched, *mixed, truth))
    positions = place_elements(world).to(stacked)
    columns = steer(positions, stacked, wavenumber=world.wavenumber, model=world.steering)
    active = batch.active.to(stacked.dtype)
    return tuple(part.mT for part in (columns * active[..., None]).unbind(0))


def _sample_columns(batch: Batch) -> torch.Tensor:
    """Columns X of the sample covariance X X^H at trace N, [B, N, L]; data without gradient."""
    with torch.no_grad():
        x_BLN = invert_snapshots(batch.y, batch.h, codes=batch.codes)
        energy = measure_energy(x_BLN).clamp_min(_LEAST)
        return (x_BLN * (x_BLN.shape[-1] / energy).sqrt()[:, None, None]).mT


class SoundCovariance(Term):
    """||R_e - R_t||_F^2 / ||R_t||_F^2 with R_e of the blend."""

    def forward(self, view: DetectionComparison) -> torch.Tensor:
        """Mean over scenes."""
        off = view.r_blend.shrink(view.amount).subtract(view.r_target)
        return (off.measure_energy() / view.r_target.measure_energy()).mean()


class SoundPrediction(Term):
    """The same for R_pred alone, so that the network cannot hide behind the samples."""

    def forward(self, view: DetectionComparison) -> torch.Tensor:
        """Mean over scenes."""
        off = view.r_pred.shrink(view.amount).subtract(view.r_target)
        return (off.measure_energy() / view.r_target.measure_energy()).mean()


class SoundSubspace(Term):
    """||P R P||_F^2 / ||R||_F^2 of R_blend, P the projector off the true steering vectors."""

    def forward(self, view: DetectionComparison) -> torch.Tensor:
        """Mean over scenes; no eigenvectors, a ridge of 1e-4 on the Gram matrix instead."""
        dual = torch.linalg.solve(load_diagonal(view.gram, 1e-4), view.true.mH)
        outside = view.r_blend.suppress(view.true, dual)
        return (outside.measure_energy() / view.r_blend.measure_energy()).mean()


class SoundContrast(Term):
    """Cross entropy of -log(a^H R_e^-1 a) / 0.5 over a 5 x 5 stencil around each true source.

    With R_e = U U^H + c I, a^H R_e^-1 a = min_x (|a - U x|^2 + c |x|^2) / c: positive by
    construction, and its gradient is that of the minimised expression at the x that is best.
    """

    def forward(self, view: DetectionComparison) -> torch.Tensor:
        """Mean over sources and scenes."""
        kept = 1 - view.amount
        c = (kept * view.r_blend.outside + view.amount)[:, None, None]
        u_BNC = view.columns * sqrt_or_zero(kept)[:, None, None]
        a_BKGN = self.steer(lay_stencil(view.batch.points))
        slots, cells = a_BKGN.shape[1:3]
        a_BNG = a_BKGN.flatten(1, 2).mT
        with torch.no_grad():
            gram = hermitise(u_BNC.mH @ u_BNC)
            eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
            lower = torch.linalg.cholesky(gram + c * eye)
            x_BCG = torch.cholesky_solve(u_BNC.mH @ a_BNG, lower)
            size = (x_BCG.real.square() + x_BCG.imag.square()).sum(-2)
        left = a_BNG - u_BNC @ x_BCG
        energy = (left.real.square() + left.imag.square()).sum(-2)
        spread = (energy / c[:, 0] + size).unflatten(-1, (slots, cells))
        return view.average(-(-spread.log() / 0.5).log_softmax(-1)[..., cells // 2])


class SoundAlignment(Term):
    """||(I - P_sig) A||^2 / K, P_sig the signal projector of R_blend, A the predicted steering.

    Not of R_hat, whose signal subspace is that of A by construction. The projector's gradient is
    that of `linalg.project_signal`: through the gap alone.
    """

    def forward(self, view: DetectionComparison) -> torch.Tensor:
        """Mean over scenes; the columns have norm 1, so K is the energy of A."""
        projector = project_signal(view.r_blend.inside, view.batch.count)
        outside = view.turned - projector @ view.turned
        return (measure_energy(outside) / view.batch.count).mean()


class HeatMap(Term):
    """Cross entropy of the softmax over all cells against the blobs of the sources, / K."""

    def forward(self, view: DetectionComparison) -> torch.Tensor:
        """Mean over sources and scenes."""
        heat = view.read_around(view.detection.heat.log_softmax(-1))
        return view.average(-(heat * view.share).sum(-1))


class Offset(Term):
    """Laplace negative log likelihood |d| exp(-s) + s of the offsets of the cells around a source.

    d is the error of the offset in cells, s its predicted log-scale; weighted by the blob.
    """

    def forward(self, view: DetectionComparison) -> torch.Tensor:
        """Mean over sources and scenes."""
        cells = lay_cells(self.config.scenario, self.config.detector)
        centres = cells.list_coordinates(view.places)[view.around]
        error = view.places[:, :, None] - centres - view.read_around(view.detection.offsets)
        scale = view.read_around(view.detection.log_scales)
        cost = error.abs() * (-scale).exp() + scale
        return view.average(((cost @ cost.new_tensor(_AXIS_WEIGHTS)) * view.share).sum(-1))


SOUND_TERMS: dict[str, type[Term]] = {
    **SHARED,
    "cov": SoundCovariance,
    "cov_pred": SoundPrediction,
    "align": SoundAlignment,
    "subspace_align": SoundSubspace,
    "peak_contrast": SoundContrast,
    "heatmap": HeatMap,
    "offset": Offset,
}
