"""Evidence: how probable the snapshots are under K sources, powers and noise being fitted.

Evidences of different K, and of symbols that are new or the same in each snapshot, are densities of
the same snapshots, so they can be compared; no eigenvalue of a covariance is looked at.

Shapes: B scenes, S starts per scene, L snapshots, M antennas, K sources.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ris_model.estimate.field import Measurements, Overlaps, Prior, invert, overlap, square

# Smallest share of a symbol's energy that is taken for its power.
_LEAST_POWER = 1e-3
# Smallest share of the energy of the snapshots that is taken for noise: what FP32 can tell.
_LEAST_NOISE = 1e-6


@dataclass(frozen=True, slots=True)
class Evidence:
    """The logarithm of a likelihood, and the powers and noise that it was found with."""

    value: torch.Tensor  # [B, S] natural logarithm, less L M log pi
    prior: Prior


def weigh_evidence(
    measurements: Measurements,
    places: torch.Tensor,
    *,
    common: bool = False,
    rounds: int = 4,
) -> Evidence:
    """Weigh sources at places: log p(y) with symbols s_lk ~ CN(0, P_k) integrated out.

    log p = -L M log(pi sigma^2) - sum_l log det(I + P G_l^H G_l / sigma^2) - cost / sigma^2

    P and sigma^2 by expectation maximisation (Dempster, Laird and Rubin, J. R. Stat. Soc. B 39,
    1977), which never lowers it: P_k = mean_l |s_lk|^2 + var s_lk, sigma^2 = mean |y - G s|^2 and
    its variance. The first guess has the residual of maximum likelihood over its free dimensions.

    Args:
        measurements: B scenes.
        places: [B, S, K, 3], (u_x, u_y, 1/r).
        common: one symbol for all snapshots.
        rounds: of the maximisation.

    Returns:
        Values and priors.
    """
    seen = overlap(measurements, places, common=common)
    numbers = measurements.numbers
    prior = _guess(seen, count_freedom(measurements, places.shape[-2], common=common))
    for _ in range(rounds):
        prior = _improve(seen, prior, numbers)
    inverse, det, load = invert(seen.inner, prior)
    logdet = det.log().sum(-1) - load.log().sum((-2, -1))
    s = (inverse * seen.match.unsqueeze(2)).sum(3)
    cost = seen.energy - (seen.match.conj() * s).real.sum((-2, -1))
    return Evidence(-numbers * prior.noise.log() - logdet - cost / prior.noise, prior)


def count_freedom(measurements: Measurements, sources: int, *, common: bool = False) -> float:
    """Complex dimensions that K sources leave over: L M - K (L or 1) - 3 K / 2, at least 1."""
    symbols = sources if common else sources * measurements.y.shape[-1]
    return max(1.0, measurements.numbers - symbols - 1.5 * sources)


def _guess(seen: Overlaps, freedom: float) -> Prior:
    """First guess, from the symbols of maximum likelihood less the noise in them."""
    inverse, _, _ = invert(seen.inner)
    s = (inverse * seen.match.unsqueeze(2)).sum(3)
    left = seen.energy - (seen.match.conj() * s).real.sum((-2, -1))
    noise = left.maximum(_LEAST_NOISE * seen.energy) / freedom
    strength = square(s).mean(-1)
    power = strength - noise[..., None] * _read_doubt(inverse).mean(-1)
    return Prior(power.maximum(_LEAST_POWER * strength), noise)


def _improve(seen: Overlaps, prior: Prior, numbers: int) -> Prior:
    """One round of expectation maximisation."""
    inverse, _, load = invert(seen.inner, prior)
    s = (inverse * seen.match.unsqueeze(2)).sum(3)
    doubt, strength = _read_doubt(inverse), square(s)
    cost = seen.energy - (seen.match.conj() * s).real.sum((-2, -1))
    left = (cost - (load * strength).sum((-2, -1))).maximum(_LEAST_NOISE * seen.energy)
    known = (1 - load * doubt).sum((-2, -1))
    power = (strength + prior.noise[..., None, None] * doubt).mean(-1)
    return Prior(power, (left + prior.noise * known) / numbers)


def _read_doubt(inverse: torch.Tensor) -> torch.Tensor:
    """Variance of the symbols over sigma^2, [B, S, K, Z]."""
    return inverse.diagonal(dim1=2, dim2=3).real.mT
