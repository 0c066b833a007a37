"""Spectra: MUSIC and MVDR over directions and ranges, from a covariance at the surface.

2.5-D: over directions, the largest value of a few ranges; then the range of each peak alone.

Shapes: B scenes, N elements, K sources, X and Y nodes along u_x and u_y, R ranges.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from ris_model.config import Scenario
from ris_model.estimate.fit import bound_places
from ris_model.geometry import name_places, place_elements, steer_places
from ris_model.linalg import hermitise

Kind = Literal["music", "mvdr"]
Weigh = Callable[[torch.Tensor], torch.Tensor]

# Complex numbers of steering vectors and their products that are held at a time.
_CHUNK = 4_000_000
# Loading of MVDR over the mean of the diagonal.
_LOADING = 1e-2
_LEAST = 1e-9
# Eigenvalues above this share of the largest count as sources, where there is no noise.
_RANK_SHARE = 1e-3


@dataclass(frozen=True, slots=True)
class ScanGrid:
    """Nodes of a scan, uniform in (u_x, u_y, 1/r)."""

    columns: int = 61
    rows: int = 35
    planes: int = 6
    ranges: int = 61  # of the search along the range of one peak


@dataclass(frozen=True, slots=True)
class Spectrum:
    """A scan of B scenes, and the peaks that were read off it."""

    map: torch.Tensor  # [B, Y, X] largest value over the ranges, natural logarithm
    points: torch.Tensor  # [B, K, 3] (phi, theta, r), highest first
    count: torch.Tensor  # [B] peaks found, K at most


def scan(
    r: torch.Tensor,
    scenario: Scenario,
    *,
    kind: Kind,
    count: torch.Tensor,
    grid: ScanGrid | None = None,
) -> Spectrum:
    """Scan a covariance for sources.

    MUSIC 1 / a^H (I - E E^H) a, E the K first eigenvectors (Schmidt, IEEE Trans. AP 34, 1986);
    MVDR 1 / a^H (R + load I)^-1 a (Capon, Proc. IEEE 57, 1969). Peaks are nodes above their eight
    neighbours; each is moved to the top of a parabola through the logarithms along u_x and u_y,
    then its range is sought on a line and refined the same way. Fewer peaks than sources are given
    back as fewer: nothing is filled up.

    Args:
        r: [B, N, N] Hermitian covariance of the field at the surface.
        scenario: surface and view.
        kind: which spectrum.
        count: [B] sources, at least 1; how many peaks are read, and the rank of E.
        grid: nodes.

    Returns:
        Map, points and how many of them there are.
    """
    grid = grid or ScanGrid()
    weigh = _prepare_music(r, count) if kind == "music" else _prepare_mvdr(r)
    low, high = (bound.to(r.real.dtype) for bound in bound_places(scenario))
    axes = [
        torch.linspace(float(a), float(b), n, dtype=low.dtype)
        for a, b, n in zip(low, high, (grid.columns, grid.rows, grid.planes), strict=True)
    ]
    spectrum = _map_directions(weigh, axes, scenario, scenes=len(r))
    peaks = int(count.max())
    directions, found = _read_peaks(spectrum, axes, peaks)
    line = torch.linspace(float(low[2]), float(high[2]), grid.ranges, dtype=low.dtype)
    places = _seek_ranges(weigh, directions, line, scenario)
    return Spectrum(spectrum, name_places(places), found.minimum(count))


def count_rank(r: torch.Tensor) -> torch.Tensor:
    """Rank of noise-free covariances, [B]: eigenvalues above 1e-3 of the largest."""
    values = torch.linalg.eigvalsh(r)
    rank: torch.Tensor = (values > _RANK_SHARE * values[:, -1:]).sum(-1)
    return rank


def scan_ceiling(
    r_true: torch.Tensor, scenario: Scenario, grid: ScanGrid | None = None
) -> Spectrum:
    """MUSIC on the noise-free label: what the scan gives away when nothing is estimated.

    Neither K nor ranges are told: K is the rank of the matrix. It is no limit of what measurements
    allow, which is the Cramer-Rao bound.
    """
    return scan(r_true, scenario, kind="music", count=count_rank(r_true), grid=grid)


def _prepare_music(r: torch.Tensor, count: torch.Tensor) -> Weigh:
    """Logarithm of the MUSIC spectrum of [B, C, N] steering vectors."""
    _, vectors = torch.linalg.eigh(hermitise(r))
    side = r.shape[-1]
    signal = torch.arange(side, device=r.device) >= side - count[:, None]
    top = (vectors * signal[:, None])[..., side - int(count.max()) :]

    def weigh(a: torch.Tensor) -> torch.Tensor:
        inside: torch.Tensor = (a.conj() @ top).abs().square().sum(-1)
        return -(1.0 - inside).clamp_min(_LEAST).log()

    return weigh


def _prepare_mvdr(r: torch.Tensor) -> Weigh:
    """Logarithm of the MVDR spectrum of [B, C, N] steering vectors."""
    mean = r.diagonal(dim1=-2, dim2=-1).real.mean(-1)[:, None, None]
    eye = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    lower = torch.linalg.cholesky(hermitise(r) + _LOADING * mean * eye)
    inverse = torch.linalg.solve_triangular(lower, eye.expand_as(r), upper=False)

    def weigh(a: torch.Tensor) -> torch.Tensor:
        spread: torch.Tensor = (a @ inverse.mT).abs().square().sum(-1)
        return -spread.clamp_min(_LEAST).log()

    return weigh


def _steer(places: torch.Tensor, scenario: Scenario) -> torch.Tensor:
    """Steering vectors of places."""
    positions = place_elements(scenario).to(places)
    return steer_places(positions, places, wavenumber=scenario.wavenumber, model=scenario.steering)[
        0
    ]


def _map_directions(
    weigh: Weigh,
    axes: list[torch.Tensor],
    scenario: Scenario,
    *,
    scenes: int,
) -> torch.Tensor:
    """Largest logarithm over the planes, [B, Y, X], in pieces of bounded memory."""
    x, y, planes = axes
    v, u = torch.meshgrid(y, x, indexing="ij")
    directions = torch.stack((u.flatten(), v.flatten()), dim=-1)
    per_node = scenes * len(planes) * scenario.elements
    step = max(1, _CHUNK // per_node)
    parts = []
    for some in directions.split(step):
        many = some[:, None].expand(-1, len(planes), -1)
        places = torch.cat((many, planes[None, :, None].expand(len(some), -1, 1)), dim=-1)
        a = _steer(places.flatten(0, 1), scenario).expand(scenes, -1, -1)
        parts.append(weigh(a).unflatten(1, (-1, len(planes))).amax(-1))
    spectrum: torch.Tensor = torch.cat(parts, dim=1).unflatten(1, (len(y), len(x)))
    return spectrum


def _read_peaks(
    spectrum: torch.Tensor,
    axes: list[torch.Tensor],
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Highest local maxima, refined, [B, K, 2], and how many of them exist, [B]."""
    padded = functional.pad(spectrum[:, None], (1, 1, 1, 1), value=-math.inf)
    around = functional.max_pool2d(padded, 3, stride=1)[:, 0]
    tops = spectrum.masked_fill(spectrum < around, -math.inf).flatten(1)
    value, index = tops.topk(count, dim=-1)
    columns = spectrum.shape[-1]
    row, column = index // columns, index % columns
    x, y = axes[0], axes[1]
    across = _refine(spectrum.flatten(1), index, column, step=1, last=columns - 1)
    along = _refine(spectrum.flatten(1), index, row, step=columns, last=spectrum.shape[1] - 1)
    u = x[column] + across * (x[1] - x[0])
    v = y[row] + along * (y[1] - y[0])
    return torch.stack((u, v), dim=-1), value.isfinite().sum(-1)


def _refine(
    values: torch.Tensor,
    index: torch.Tensor,
    place: torch.Tensor,
    *,
    step: int,
    last: int,
) -> torch.Tensor:
    """Top of the parabola through a node and its neighbours, in nodes, -1/2 to 1/2; 0 at edges."""
    end = values.shape[-1] - 1
    middle = values.gather(1, index)
    before = values.gather(1, (index - step).clamp(0, end))
    after = values.gather(1, (index + step).clamp(0, end))
    bend = before - 2 * middle + after
    top = 0.5 * (before - after) / bend.clamp_max(-_LEAST)
    inside = (place > 0) & (place < last) & (bend < 0)
    return torch.where(inside, top.clamp(-0.5, 0.5), 0.0)


def _seek_ranges(
    weigh: Weigh,
    directions: torch.Tensor,
    line: torch.Tensor,
    scenario: Scenario,
) -> torch.Tensor:
    """Places [B, K, 3] of directions [B, K, 2], by a search along 1/r."""
    scenes, peaks = directions.shape[:2]
    many = directions[:, :, None].expand(-1, -1, len(line), -1)
    inverse = line[None, None, :, None].expand(scenes, peaks, -1, 1)
    places = torch.cat((many, inverse), dim=-1)
    values = weigh(_steer(places.flatten(1, 2), scenario)).unflatten(1, (peaks, -1))
    flat = values.flatten(0, 1)
    best = flat.argmax(-1, keepdim=True)
    shift = _refine(flat, best, best, step=1, last=len(line) - 1)
    w = (line[best] + shift * (line[1] - line[0])).view(scenes, peaks, 1)
    return torch.cat((directions, w), dim=-1)
