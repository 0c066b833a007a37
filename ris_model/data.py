"""Data: scenes made on the fly; the same batch everywhere for (seed, split, index).

Shapes: B scenes, L snapshots, M antennas, N elements, K source slots (K_MAX).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ris_model.channel import (
    add_noise,
    draw_channel,
    draw_symbols,
    draw_uniform,
    list_codes,
    observe,
)
from ris_model.config import SPLITS, Scenario, Split
from ris_model.covariance import estimate_samples, form_sources
from ris_model.geometry import place_elements, steer

# Where the empty slots point: anything that can be steered to; no term reads it.
_EMPTY_RANGE = 1.0


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

    y_l = H diag(c_l) A s_l + n_l, with a source's amplitude gain * wavelength / (4 pi r).
    """
    rng = seed_batch(seed, split, index)
    count = torch.from_numpy(rng.integers(1, scenario.sources + 1, size))
    points = _draw_points(rng, scenario, size=size)
    active = torch.arange(scenario.sources) < count[:, None]
    amplitude = scenario.gain * scenario.wavelength / (4 * np.pi * points[..., 2])
    power = torch.where(active, amplitude.square(), 0.0)
    snr_db = draw_uniform(rng, (size,), low=scenario.snr_min, high=scenario.snr_max)
    h = draw_channel(rng, scenario, count=size)
    codes = list_codes(scenario).repeat(size, 1, 1)
    symbols = draw_symbols(rng, power, snapshots=scenario.snapshots, coherent=scenario.coherent)
    a_BKN = steer(
        place_elements(scenario),
        points,
        wavenumber=scenario.wavenumber,
        model=scenario.steering,
    )
    clean = observe(h, codes, steering=a_BKN, symbols=symbols)
    y, variance = add_noise(rng, clean, snr_db=snr_db)
    batch = Batch(
        y=y,
        h=h,
        codes=codes,
        ptr=torch.where(active[..., None], points, 0.0).mT.flatten(1),
        count=count,
        power=power,
        symbols=symbols,
        noise_variance=variance,
        snr_db=snr_db,
        source_snr_db=_measure_sources(h, codes, a_BKN, symbols) - _decibel(variance)[:, None],
        r_true=form_true(a_BKN, power),
        r_samp=estimate_samples(y, h, codes=codes),
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
