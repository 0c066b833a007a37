"""The incident's view of a prediction, and the alignment term that fails."""

from __future__ import annotations

import torch

from ris_model.config import Config
from ris_model.covariance import (
    choose_shrinkage,
    form_blend,
    form_effective,
    form_predicted,
    load_diagonal,
    shrink,
)
from ris_model.data import Batch
from ris_model.losses.matching import match_slots, pick_slots
from ris_model.losses.terms import SHARED, DenseComparison, Term, lift, measure_energy
from ris_model.network import Prediction


def prepare_prediction(prediction: Prediction, batch: Batch, config: Config) -> DenseComparison:
    """Lift both sides to at least FP32 and form what the terms share: R_hat = F F^H.

    The orthogonality term sees the raw angle factors, before the QR retraction: after it the term
    is 0 whatever the network says.
    """
    prediction = lift(prediction)
    batch = lift(batch)
    form = config.covariance
    factors = prediction.factors
    side, slots = factors.shape[-2:]
    r_hat = form_predicted(factors, trace=1.0)
    r_full = side * r_hat
    r_blend = form_blend(r_full, batch.r_samp, blend=form.blend)
    return DenseComparison(
        batch=batch,
        r_hat=r_hat,
        r_spectral=r_hat,
        r_pred=form_effective(r_full, batch.snr_db, form=form),
        r_blend=r_blend,
        r_effective=form_effective(r_blend, batch.snr_db, form=form),
        r_target=shrink(batch.r_true, choose_shrinkage(batch.snr_db, form)),
        factors=factors,
        factor_angle=prediction.factor_angle,
        factor_range=prediction.factor_range,
        gram=torch.eye(slots, dtype=factors.dtype, device=factors.device),
        matched=pick_slots(prediction.slots, match_slots(prediction.slots, batch)),
        k_logits=prediction.k_logits,
    )


class Alignment(Term):
    """||(I - P_sig) F||^2 / ||F||^2, P_sig from the top-K eigenvectors of R_hat, trace 1.

    As the case report had it. R_hat has rank K_MAX, its loaded null eigenvalues are equal to the
    last bit, and the gradient of `eigh` divides by their differences: NaN from a finite loss.
    `linalg.project_signal` is the projector whose gradient is defined.
    """

    def forward(self, view: DenseComparison) -> torch.Tensor:
        """Mean over scenes."""
        factors = view.factors
        loaded = load_diagonal(view.r_hat, self.config.covariance.align_loading)
        _, vectors = torch.linalg.eigh(loaded)
        side = vectors.shape[-1]
        rank = torch.arange(side, device=vectors.device)
        top = vectors * (rank >= side - view.batch.count[:, None])[:, None, :]
        outside = factors - top @ (top.mH @ factors)
        return (measure_energy(outside) / measure_energy(factors)).mean()


INCIDENT_TERMS: dict[str, type[Term]] = {**SHARED, "align": Alignment}
