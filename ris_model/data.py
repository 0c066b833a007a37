"""Data: scenes made on the fly; the same batch everywhere for (seed, split, index).

Shapes: B scenes, L snapshots, M antennas, N elements, K source slots (K_MAX).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ris_model.channel import (
    add_noise,
    disturb_channel,
    disturb_codes,
    disturb_positions,
    draw_channel,
    draw_codes,
    draw_symbols,
    draw_uniform,
    observe,
)
from ris_model.config import SPLITS, Scenario, Split
from ris_model.covariance import estimate_samples, form_sources
from ris_model.geometry import place_elements, steer

# Where the empty slots point: anything that can be steered to; no term reads it.
_EMPTY_RANGE = 1.0
# How often sources that are too close are drawn again.
_TRIES = 100


@dataclass(frozen=True, slots=True)
class Batch:
    """Scenes with their labels; every tensor has B in front.

    Empty source slots hold 0. Angles in radians, ranges in metres.
    """

    y: torch.Tensor  # [B, L, M] complex, snapshots
    h: torch.Tensor  # [B, M, N] complex, channel
    codes: torch.Tensor  # [B, L, N] complex, surface codes
    ptr: torch.Tensor  # [B, 3K] real: phi | theta | r
    count: torch.Tensor  # [B] int64, true number of sources
    power: torch.Tensor  # [B, K] real, of each source at the surface
    symbols: torch.Tensor  # [B, L, K] complex, as sent, power included
    noise_variance: torch.Tensor  # [B] real, sigma^2
    snr_db: torch.Tensor  # [B] real, of the sum of the sources
    source_snr_db: torch.Tensor  # [B, K] real, of each source alone
    r_true: torch.Tensor  # [B, N, N] complex, A diag(power) A^H at trace N
    r_samp: torch.Tensor  # [B, N, N] complex, sample covariance at trace N

    @property
    def samples(self) -> int:
        """B, number of scenes."""
        return self.y.shape[0]

    @property
    def active(self) -> torch.Tensor:
        """Which slots hold a source, [B, K] bool."""
        slots = torch.arange(self.power.shape[-1], device=self.count.device)
        return slots < self.count[:, None]

    @property
    def points(self) -> torch.Tensor:
        """(phi, theta, r) of each slot, [B, K, 3]; empty slots lie at boresight, 1 m."""
        points = self.ptr.view(self.samples, 3, -1).mT
        empty = points.new_tensor((0.0, 0.0, _EMPTY_RANGE))
        return torch.where(self.active[..., None], points, empty)


def seed_batch(seed: int, split: Split, index: int) -> np.random.Generator:
    """Generator of one batch: child `index` of child `split` of the root seed.

    The same as SeedSequence(seed).spawn(3)[split].spawn(index + 1)[index], without the walk.
    Splits are disjoint, because the children of different parents are.
    """
    key = (SPLITS.index(split), index)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def draw_batch(scenario: Scenario, *, seed: int, split: Split, index: int, size: int) -> Batch:
    """Make batch `index` of `split`: float32 / complex64, computed in double precision.

    y_l = H diag(c_l) A s_l + n_l, with a source's amplitude gain * wavelength / (4 pi r), or
    `gain` wherever it is. `h` and `codes` are what the receiver takes them for; y is made with
    the true ones, `r_true` and `ptr` belong to the nominal surface.

    Raises:
        ValueError: where no sources can be drawn that keep the scenario's correlation.
    """
    rng = seed_batch(seed, split, index)
    (extra,) = rng.spawn(1)  # of the options: without them every draw is as it always was
    count = torch.from_numpy(rng.integers(1, scenario.sources + 1, size))
    active = torch.arange(scenario.sources) < count[:, None]
    points = _part_points(extra, _draw_points(rng, scenario, size=size), active, scenario)
    snr_db = draw_uniform(rng, (size,), low=scenario.snr_min, high=scenario.snr_max)
    power = torch.where(active, _choose_power(extra, points, scenario), 0.0)
    h = draw_channel(rng, scenario, count=size)
    codes = draw_codes(extra, scenario, count=size)
    shown = disturb_codes(extra, codes, scenario)
    symbols = draw_symbols(
        rng,
        power,
        snapshots=scenario.snapshots,
        coherent=_choose_coherent(extra, scenario, size=size),
    )
    positions = disturb_positions(extra, scenario, count=size)
    a_BKN = _steer(positions, points, scenario)
    clean = observe(h, shown, steering=a_BKN, symbols=symbols)
    y, variance = add_noise(rng, clean, snr_db=snr_db)
    known = disturb_channel(extra, h, error_db=scenario.channel_error)
    batch = Batch(
        y=y,
        h=known,
        codes=codes,
        ptr=torch.where(active[..., None], points, 0.0).mT.flatten(1),
        count=count,
        power=power,
        symbols=symbols,
        noise_variance=variance,
        snr_db=snr_db,
        source_snr_db=_measure_sources(h, shown, a_BKN, symbols) - _decibel(variance)[:, None],
        r_true=form_true(_steer(place_elements(scenario), points, scenario), power),
        r_samp=estimate_samples(y, known, codes=codes),
    )
    return _round_to_single(batch)


def form_true(steering: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    """R_true = A diag(power) A^H at trace N, [B, N, N] from [B, K, N] and [B, K]."""
    return form_sources(steering, power)


def _draw_points(rng: np.random.Generator, scenario: Scenario, *, size: int) -> torch.Tensor:
    """(phi, theta, r), uniform, [B, K, 3] float64."""
    shape = (size, scenario.sources)
    azimuth, elevation = scenario.azimuth_limit, scenario.elevation_limit
    return torch.stack(
        (
            draw_uniform(rng, shape, low=-azimuth, high=azimuth),
            draw_uniform(rng, shape, low=-elevation, high=elevation),
            draw_uniform(rng, shape, low=scenario.range_min, high=scenario.range_max),
        ),
        dim=-1,
    )


def _steer(positions: torch.Tensor, points: torch.Tensor, scenario: Scenario) -> torch.Tensor:
    """Steering vectors [B, K, N] of a scenario's wave."""
    return steer(positions, points, wavenumber=scenario.wavenumber, model=scenario.steering)


def _part_points(
    rng: np.random.Generator,
    points: torch.Tensor,
    active: torch.Tensor,
    scenario: Scenario,
) -> torch.Tensor:
    """Redraw the points of a scene until |<a_i, a_k>| < correlation_max for all its sources."""
    if scenario.correlation_max >= 1.0:
        return points
    positions = place_elements(scenario)
    points = points.clone()
    close = torch.arange(len(points))
    for _ in range(_TRIES):
        a_BKN = _steer(positions, points[close], scenario) * active[close][..., None]
        gram = (a_BKN.conj() @ a_BKN.mT).abs()
        gram.diagonal(dim1=-2, dim2=-1).zero_()
        close = close[gram.amax((-2, -1)) >= scenario.correlation_max]
        if not len(close):
            return points
        points[close] = _draw_points(rng, scenario, size=len(close))
    msg = (
        f"{scenario.sources} sources with correlations below {scenario.correlation_max:g} were "
        f"not found in {_TRIES} draws; raise correlation_max or have fewer sources"
    )
    raise ValueError(msg)


def _choose_power(
    rng: np.random.Generator,
    points: torch.Tensor,
    scenario: Scenario,
) -> torch.Tensor:
    """Power of each source at the surface, [B, K]."""
    if scenario.power_law == "equal":
        power = torch.full_like(points[..., 2], scenario.gain**2)
    else:
        amplitude = scenario.gain * scenario.wavelength / (4 * np.pi * points[..., 2])
        power = amplitude.square()
    if not scenario.power_spread:
        return power
    shape = tuple(power.shape)
    weaker = draw_uniform(rng, shape, low=-scenario.power_spread, high=0.0)
    chosen = torch.from_numpy(rng.random(len(power)) < scenario.spread_share)[:, None]
    return power * torch.where(chosen, 10.0 ** (weaker / 10.0), 1.0)


def _choose_coherent(
    rng: np.random.Generator,
    scenario: Scenario,
    *,
    size: int,
) -> bool | torch.Tensor:
    """Whether all scenes are coherent, or [B] which."""
    if scenario.coherent or not scenario.coherent_share:
        return scenario.coherent
    return torch.from_numpy(rng.random(size) < scenario.coherent_share)


def _decibel(power: torch.Tensor) -> torch.Tensor:
    """10 log10 of a power; an empty slot's 0 is left at 0 dB."""
    return torch.where(power > 0, 10.0 * torch.where(power > 0, power, 1.0).log10(), 0.0)


def _measure_sources(
    h: torch.Tensor,
    codes: torch.Tensor,
    steering: torch.Tensor,
    symbols: torch.Tensor,
) -> torch.Tensor:
    """Mean received power of each source alone, dB, [B, K]."""
    response_BKLM = (codes[:, None] * steering[:, :, None]) @ h.mT[:, None]
    alone = response_BKLM * symbols.mT[..., None]
    return _decibel(alone.abs().square().mean(dim=(-2, -1)))


def _round_to_single(batch: Batch) -> Batch:
    """Round every tensor to FP32 / complex64; integers stay."""
    kinds = {torch.float64: torch.float32, torch.complex128: torch.complex64}
    rounded = {}
    for name in Batch.__slots__:
        tensor = getattr(batch, name)
        rounded[name] = tensor.to(kinds.get(tensor.dtype, tensor.dtype)).contiguous()
    return Batch(**rounded)
