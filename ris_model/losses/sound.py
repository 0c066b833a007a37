"""The sound profile's view of a detection, and the terms that it alone has.

The covariance is built from the geometry of the decoded sources, so every term reads numbers that
the measurements determine, and each has a defined gradient: no eigenvector is differentiated, no
quotient has a predicted norm below it.

Shapes: B scenes, N elements, G cells, K source slots (K_MAX).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ris_model.cells import lay_cells
from ris_model.config import Config
from ris_model.covariance import (
    choose_shrinkage,
    form_blend,
    form_compact,
    form_effective,
    form_sources,
    shrink,
)
from ris_model.data import Batch
from ris_model.geometry import place_elements, steer
from ris_model.linalg import project_signal
from ris_model.losses.matching import match_slots, pick_slots
from ris_model.losses.terms import SHARED, Comparison, Term, lift, measure_energy
from ris_model.network import Detection, decode

# Of the errors of an offset along u_x, u_y, 1/r: the range is the least certain of the three.
_AXIS_WEIGHTS = (1.0, 1.0, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionComparison(Comparison):
    """A comparison that still holds the heat map, with the cells around each true source."""

    detection: Detection
    places: torch.Tensor  # [B, K, 3] coordinates of the true sources, cells
    around: torch.Tensor  # [B, K, 27] flattened cells around them
    share: torch.Tensor  # [B, K, 27] what each is to have of the heat, sum 1 per source

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
    matched, truth = pick_slots(sources.points, order), batch.points
    mixed = (
        torch.cat((a[..., :2], b[..., 2:]), -1) for a, b in ((matched, truth), (truth, matched))
    )
    stacked = torch.stack((matched, *mixed, truth))
    positions = place_elements(world).to(stacked)
    columns = steer(positions, stacked, wavenumber=world.wavenumber, model=world.steering)
    active = batch.active.to(stacked.dtype)
    a_BKN, angle, ranges, true = (columns * active[..., None]).unbind(0)
    power = pick_slots(sources.log_power, order).exp() * active
    noise = detection.log_noise.exp()
    r_full = form_sources(a_BKN, power, noise)
    r_blend = form_blend(r_full, batch.r_samp, blend=form.blend)
    places = cells.locate(truth)
    around, share = cells.surround(places)
    return DetectionComparison(
        batch=batch,
        r_hat=r_full / r_full.shape[-1],
        r_spectral=form_compact(a_BKN, power, noise),
        r_pred=form_effective(r_full, batch.snr_db, form=form),
        r_blend=r_blend,
        r_effective=form_effective(r_blend, batch.snr_db, form=form),
        r_target=shrink(batch.r_true, choose_shrinkage(batch.snr_db, form)),
        factors=a_BKN.mT,
        factor_angle=angle.mT,
        factor_range=ranges.mT,
        gram=true.conj() @ true.mT,
        matched=matched,
        k_logits=detection.k_logits,
        detection=detection,
        places=places,
        around=around,
        share=share,
    )


class SoundAlignment(Term):
    """||(I - P_sig) A||^2 / K, P_sig the signal projector of R_blend, A the predicted steering.

    Not of R_hat, whose signal subspace is that of A by construction. The projector's gradient is
    that of `linalg.project_signal`: through the gap alone.
    """

    def forward(self, view: Comparison) -> torch.Tensor:
        """Mean over scenes; the columns have norm 1, so K is the energy of A."""
        projector = project_signal(view.r_blend, view.batch.count)
        outside = view.factors - projector @ view.factors
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
    "align": SoundAlignment,
    "heatmap": HeatMap,
    "offset": Offset,
}
