"""Metrics: found sources beside true ones: raw errors, misses, false alarms, distances, success.

Nothing is thrown away before it is counted: an error of a matched pair is reported whatever its
size, and a pair that is too far apart is a miss and a false alarm besides.

Shapes: B scenes, K slots of true sources, F slots of found ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

# What errors are divided by when sources are matched, and beyond which a pair is none.
MATCH_SCALE = (math.radians(5.0), math.radians(5.0), 1.0)  # rad, rad, m
# A scene is a success when K is right and every error is below this.
SUCCESS = (math.radians(3.0), math.radians(3.0), 0.5)
# A scene is an outlier when an angle of a matched pair is further off than this, rad.
OUTLIER = math.radians(5.0)
# Cut-off of the GOSPA distance, m.
GOSPA_CUT = 1.0
# Edges of the SNR bins, dB: up to 0, 0 to 10, above 10.
SNR_EDGES = (0.0, 10.0)


@dataclass(frozen=True, slots=True)
class Scores:
    """What became of B scenes; joined over batches by `join`."""

    errors: np.ndarray  # [B, K, 3] |error| of matched sources, rad, rad, m; NaN where none is
    count: np.ndarray  # [B] true sources
    found: np.ndarray  # [B] found ones
    misses: np.ndarray  # [B] true sources without a found one near enough
    alarms: np.ndarray  # [B] found sources without a true one near enough
    gospa: np.ndarray  # [B] m
    snr_db: np.ndarray  # [B]

    @property
    def right(self) -> np.ndarray:
        """[B] whether K is right."""
        return np.asarray(self.count == self.found)

    @property
    def outlier(self) -> np.ndarray:
        """[B] whether an angle of a matched pair is off by more than 5 degrees."""
        return np.asarray(np.nan_to_num(self.errors[..., :2]).max((1, 2)) > OUTLIER)

    @property
    def success(self) -> np.ndarray:
        """[B] whether K is right and every error is below 3 degrees, 3 degrees, 0.5 m."""
        near = (np.nan_to_num(self.errors) < np.array(SUCCESS)).all((1, 2))
        return np.asarray(near & self.right)

    @property
    def rmspe(self) -> np.ndarray:
        """[B] root mean square of the angle errors of matched pairs, rad; NaN without a pair."""
        pairs = np.isfinite(self.errors[..., 0]).sum(1)
        total = np.nansum(np.square(self.errors[..., :2]), (1, 2))
        return np.asarray(
            np.sqrt(np.divide(total, 2 * pairs, where=pairs > 0, out=0.0 * total + np.nan))
        )

    def select(self, index: np.ndarray) -> Scores:
        """Return the scenes of an index or a mask."""
        return Scores(*(getattr(self, name)[index] for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of a set of scenes; angles in radians, lengths in metres, rates in 0 to 1."""

    scenes: int
    median: tuple[float, float, float]  # of |error| over matched sources
    p95: tuple[float, float, float]
    rmspe: float  # mean over scenes
    gospa: float  # mean over scenes
    outliers: float  # share of scenes
    misses: float  # share of the true sources
    alarms: float  # per true source
    success: float  # share of scenes
    right: float  # share of scenes whose K is right


def score(
    points: torch.Tensor,
    found: torch.Tensor,
    *,
    count: torch.Tensor,
    found_count: torch.Tensor,
    snr_db: torch.Tensor,
) -> Scores:
    """Match found to true sources, scene by scene, at the least total cost (Hungarian).

    The cost of a pair is its squared error over (5 deg, 5 deg, 1 m), azimuths wrapped. min(K, F)
    pairs are matched in every scene; those with an error beyond the scale count as missed as well.

    Args:
        points: [B, K, 3] true (phi, theta, r) in rad, rad, m.
        found: [B, F, 3].
        count: [B] true sources, the first slots.
        found_count: [B] found ones, the first slots.
        snr_db: [B].
    """
    truth, guess = points.double().cpu().numpy(), found.double().cpu().numpy()
    counts, founds = count.cpu().numpy(), found_count.cpu().numpy()
    scenes, slots = truth.shape[:2]
    errors = np.full((scenes, slots, 3), np.nan)
    gospa = np.zeros(scenes)
    for scene in range(scenes):
        a, b = truth[scene, : counts[scene]], guess[scene, : founds[scene]]
        gap = a[:, None] - b[None]
        gap[..., :2] = (gap[..., :2] + math.pi) % (2 * math.pi) - math.pi
        rows, columns = linear_sum_assignment(np.square(gap / MATCH_SCALE).sum(-1))
        errors[scene, rows] = np.abs(gap[rows, columns])
        gospa[scene] = measure_gospa(a, b)
    near = (errors < np.array(MATCH_SCALE)).all(-1).sum(1)
    return Scores(
        errors=errors,
        count=counts,
        found=founds,
        misses=counts - near,
        alarms=founds - near,
        gospa=gospa,
        snr_db=snr_db.double().cpu().numpy(),
    )


def measure_gospa(truth: np.ndarray, found: np.ndarray, *, cut: float = GOSPA_CUT) -> float:
    """GOSPA distance of two sets of (phi, theta, r) points as positions in space, m.

    sqrt(min over assignments of sum d^2 + c^2 / 2 for every source without partner), pairs beyond
    c unassigned: Rahmathullah, Garcia-Fernandez and Svensson (FUSION 2017), p = 2, alpha = 2.
    """
    gap = place_in_space(truth)[:, None] - place_in_space(found)[None]
    cost = np.minimum(np.square(gap).sum(-1), cut**2)
    rows, columns = linear_sum_assignment(cost)
    single = abs(len(truth) - len(found))
    return float(np.sqrt(cost[rows, columns].sum() + cut**2 / 2 * single))


def place_in_space(points: np.ndarray) -> np.ndarray:
    """Positions r (sin phi cos theta, sin theta, cos phi cos theta) of [..., 3] points, m."""
    phi, theta, r = np.moveaxis(points, -1, 0)
    direction = (np.sin(phi) * np.cos(theta), np.sin(theta), np.cos(phi) * np.cos(theta))
    return np.asarray(r[..., None] * np.stack(direction, axis=-1))


def join(parts: list[Scores]) -> Scores:
    """Join the scores of batches."""
    return Scores(*(np.concatenate([getattr(p, n) for p in parts]) for n in Scores.__slots__))


def summarise(scores: Scores) -> Summary:
    """Summarise scenes; a figure of no pair at all is NaN."""
    flat = scores.errors.reshape(-1, 3)
    flat = flat[np.isfinite(flat[:, 0])]
    nothing = np.full(3, np.nan)
    median = np.median(flat, 0) if len(flat) else nothing
    p95 = np.quantile(flat, 0.95, axis=0) if len(flat) else nothing
    pairs = scores.rmspe[np.isfinite(scores.rmspe)]
    sources = max(1, int(scores.count.sum()))
    return Summary(
        scenes=len(scores.count),
        median=(float(median[0]), float(median[1]), float(median[2])),
        p95=(float(p95[0]), float(p95[1]), float(p95[2])),
        rmspe=float(pairs.mean()) if len(pairs) else math.nan,
        gospa=float(scores.gospa.mean()),
        outliers=float(scores.outlier.mean()),
        misses=float(scores.misses.sum() / sources),
        alarms=float(scores.alarms.sum() / sources),
        success=float(scores.success.mean()),
        right=float(scores.right.mean()),
    )


def split_by_snr(scores: Scores) -> dict[str, Scores]:
    """Scenes up to 0 dB, from 0 to 10 dB and above 10 dB; a bin without scenes is left out."""
    low, high = SNR_EDGES
    snr = scores.snr_db
    masks = {
        f"<= {low:g} dB": snr <= low,
        f"{low:g} to {high:g} dB": (snr > low) & (snr <= high),
        f"> {high:g} dB": snr > high,
    }
    return {name: scores.select(mask) for name, mask in masks.items() if mask.any()}
