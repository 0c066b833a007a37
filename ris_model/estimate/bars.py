"""Bars: how far an answer may be trusted, by the bound at the answer itself.

Shapes: B scenes, K source slots.
"""

from __future__ import annotations

import torch

from ris_model.estimate.bound import bound_covariance, bound_points
from ris_model.estimate.field import Measurements, invert, overlap
from ris_model.estimate.localise import Located


def estimate_bars(measurements: Measurements, answer: Located) -> torch.Tensor:
    """Standard deviations of (phi, theta, r) of every found source, [B, K_MAX, 3] float64.

    The Cramer-Rao bound with the places, symbols and noise of the answer put in. It knows nothing
    of an outlier, a wrong K or a surface that is not what it is taken for. NaN in empty slots.
    """
    bars = torch.full(answer.places.shape, torch.nan, dtype=torch.float64)
    for sources in answer.count.unique().tolist():
        for common in (False, True):
            chosen = (answer.count == sources) & (answer.coherent == common)
            index = chosen.nonzero()[:, 0]
            if len(index):
                part, places = measurements.select(index), answer.places[index, :sources]
                covariance = bound_covariance(
                    part,
                    places,
                    _fit_symbols(part, places, common=common),
                    noise=answer.noise[index],
                    common=common,
                )
                bars[index, :sources] = bound_points(covariance, places).cpu()
    return bars


def _fit_symbols(part: Measurements, places: torch.Tensor, *, common: bool) -> torch.Tensor:
    """Symbols of least squares at places, [B, L, K]."""
    seen = overlap(part, places[:, None], common=common)
    inverse, _, _ = invert(seen.inner)
    s = (inverse * seen.match.unsqueeze(2)).sum(3)[:, 0]
    return s.mT.expand(-1, part.y.shape[-1], -1)
