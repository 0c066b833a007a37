"""Channel: from the surface to the station; codes, snapshots, noise for a given SNR.

Shapes: B scenes, L snapshots, M antennas, N elements, K source slots. Everything complex128:
the data are made once in double precision and rounded when a batch is put together.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ris_model.geometry import place_elements, steer_planar

if TYPE_CHECKING:
    import numpy as np

    from ris_model.config import Scenario


def draw_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw circular complex normal numbers, CN(0, 1), complex128."""
    parts = torch.from_numpy(rng.standard_normal((*shape, 2)))
    return torch.view_as_complex(parts) * math.sqrt(0.5)


def draw_uniform(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    *,
    low: float,
    high: float,
) -> torch.Tensor:
    """Draw uniform real numbers in [low, high), float64."""
    return torch.from_numpy(rng.uniform(low, high, shape))


def draw_channel(rng: np.random.Generator, scenario: Scenario, *, count: int) -> torch.Tensor:
    """Draw Rician channels from the surface to the station.

    H = sqrt(kf/(kf+1)) sqrt(N) a_BS a_RIS^H + sqrt(1/(kf+1)) G,  G_mn ~ CN(0, 1/M)

    Both parts have the squared Frobenius norm N (the scatter in the mean), so that kf really is
    the ratio of their energies. The arrival and departure angles are uniform, the K-factor is
    uniform in dB.

    Returns:
        [B, M, N] complex128.
    """
    size = (count,)
    k_db = draw_uniform(rng, size, low=scenario.rician_min, high=scenario.rician_max)
    los_BMN = _form_line_of_sight(rng, scenario, count=count)
    scatter_BMN = draw_normal(rng, (count, scenario.antennas, scenario.elements))
    scatter_BMN = scatter_BMN / math.sqrt(scenario.antennas)
    return mix_rician(los_BMN, scatter_BMN, k_db=k_db)


def mix_rician(los: torch.Tensor, scatter: torch.Tensor, *, k_db: torch.Tensor) -> torch.Tensor:
    """Mix line of sight and scatter of the same norm by a K-factor [B] in dB."""
    kf = (10.0 ** (k_db / 10.0))[:, None, None]
    return (kf / (kf + 1.0)).sqrt() * los + (1.0 / (kf + 1.0)).sqrt() * scatter


def _form_line_of_sight(
    rng: np.random.Generator,
    scenario: Scenario,
    *,
    count: int,
) -> torch.Tensor:
    """Return sqrt(N) a_BS a_RIS^H, [B, M, N], squared Frobenius norm N."""
    azimuth, elevation = scenario.azimuth_limit, scenario.elevation_limit
    departure = torch.stack(
        (
            draw_uniform(rng, (count,), low=-azimuth, high=azimuth),
            draw_uniform(rng, (count,), low=-elevation, high=elevation),
        ),
        dim=-1,
    )
    arrival = torch.zeros_like(departure)
    arrival[:, 0] = draw_uniform(rng, (count,), low=-azimuth, high=azimuth)
    index = torch.arange(scenario.antennas, dtype=torch.float64) - (scenario.antennas - 1) / 2
    station = torch.stack((index, torch.zeros_like(index)), dim=-1) * scenario.wavelength / 2
    a_BM = steer_planar(station, arrival, wavenumber=scenario.wavenumber)
    a_BN = steer_planar(place_elements(scenario), departure, wavenumber=scenario.wavenumber)
    return math.sqrt(scenario.elements) * a_BM[:, :, None] * a_BN[:, None, :].conj()


def list_codes(scenario: Scenario) -> torch.Tensor:
    """List the phase codes that the surface shows, one per snapshot, the same in every scene.

    Separable 2-D DFT beams, c_n = exp(j 2 pi (p h + q v) / P), taken evenly from the P x P pool
    and quantised to `code_bits`.

    Returns:
        [L, N] complex128, unit modulus.
    """
    pool = scenario.code_pool
    beam = torch.arange(scenario.snapshots) * pool**2 // scenario.snapshots
    h = torch.arange(scenario.columns).repeat(scenario.rows)
    v = torch.arange(scenario.rows).repeat_interleave(scenario.columns)
    p, q = beam[:, None] // pool, beam[:, None] % pool
    turns_LN = (p * h + q * v).to(torch.float64) / pool
    levels = 2**scenario.code_bits
    phase_LN = 2.0 * math.pi * (turns_LN * levels).round() / levels
    return torch.polar(torch.ones_like(phase_LN), phase_LN)


def draw_symbols(
    rng: np.random.Generator,
    power: torch.Tensor,
    *,
    snapshots: int,
    coherent: bool,
) -> torch.Tensor:
    """Draw the symbols s_l ~ CN(0, P), new in every snapshot, or one for all when coherent.

    Args:
        rng: source of randomness.
        power: [B, K], 0 in the empty slots.
        snapshots: L.
        coherent: True makes the sources fully coherent in time (rank 1 over the snapshots).

    Returns:
        [B, L, K] complex128.
    """
    count, slots = power.shape
    s_BLK = draw_normal(rng, (count, 1 if coherent else snapshots, slots))
    return (s_BLK * power.sqrt()[:, None, :]).expand(count, snapshots, slots).clone()


def observe(
    h: torch.Tensor,
    codes: torch.Tensor,
    *,
    steering: torch.Tensor,
    symbols: torch.Tensor,
) -> torch.Tensor:
    """Form clean snapshots y_l = H diag(c_l) A s_l.

    Args:
        h: [B, M, N] channel.
        codes: [L, N] or [B, L, N].
        steering: [B, K, N], the columns of A as rows.
        symbols: [B, L, K].

    Returns:
        [B, L, M] complex.
    """
    return (codes * (symbols @ steering)) @ h.mT


def add_noise(
    rng: np.random.Generator,
    clean: torch.Tensor,
    *,
    snr_db: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add white noise of variance sigma^2 = mean_{l,m} |clean|^2 / 10^(snr/10).

    Returns:
        noisy [B, L, M] and sigma^2 [B] float64.
    """
    variance = clean.abs().square().mean(dim=(-2, -1)) / 10.0 ** (snr_db / 10.0)
    noise = draw_normal(rng, tuple(clean.shape)) * variance.sqrt()[:, None, None]
    return clean + noise, variance
