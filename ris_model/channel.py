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
    return _show_phases(turns_LN, scenario.code_bits)


def draw_codes(rng: np.random.Generator, scenario: Scenario, *, count: int) -> torch.Tensor:
    """Draw the codes that each scene's receiver knows of, by the codebook of the scenario.

    Returns:
        [B, L, N] complex128, unit modulus.
    """
    if scenario.codebook == "dft":
        return list_codes(scenario).repeat(count, 1, 1)
    turns = torch.from_numpy(rng.random((count, scenario.snapshots, scenario.elements)))
    return _show_phases(turns, scenario.code_bits)


def disturb_codes(
    rng: np.random.Generator,
    codes: torch.Tensor,
    scenario: Scenario,
) -> torch.Tensor:
    """Return what the surface shows when it is told `codes`: c (1 + e_a) exp(j e_p), or nothing.

    The receiver is not told. e_a and e_p are normal, an element fails with the probability
    `code_dropout`, anew in each snapshot.
    """
    if not (scenario.code_phase_error or scenario.code_amplitude_error or scenario.code_dropout):
        return codes
    shape = tuple(codes.shape)
    phase = scenario.code_phase_error * torch.from_numpy(rng.standard_normal(shape))
    gain = 1.0 + scenario.code_amplitude_error * torch.from_numpy(rng.standard_normal(shape))
    works = torch.from_numpy(rng.random(shape)) >= scenario.code_dropout
    return codes * torch.polar(gain * works, phase)


def disturb_channel(
    rng: np.random.Generator,
    h: torch.Tensor,
    *,
    error_db: float | None,
) -> torch.Tensor:
    """Return what the receiver takes for the channel: H + E, ||E||^2 / ||H||^2 = 10^(error/10).

    Args:
        rng: source of randomness.
        h: [B, M, N] true channel.
        error_db: dB, in the mean over draws; None for no error.
    """
    if error_db is None:
        return h
    level = h.abs().square().mean(dim=(-2, -1), keepdim=True).sqrt()
    error: torch.Tensor = 10.0 ** (error_db / 20.0) * level * draw_normal(rng, tuple(h.shape))
    return h + error


def disturb_positions(rng: np.random.Generator, scenario: Scenario, *, count: int) -> torch.Tensor:
    """Place the elements where they really are, uniform around their nominal places.

    Returns:
        [N, 2] nominal without an error, else [B, N, 2], metres, float64.
    """
    nominal = place_elements(scenario)
    if not scenario.position_error:
        return nominal
    reach = scenario.position_error * scenario.wavelength / 2
    shape = (count, scenario.elements, 2)
    return nominal + draw_uniform(rng, shape, low=-reach, high=reach)


def _show_phases(turns: torch.Tensor, bits: int | None) -> torch.Tensor:
    """exp(j 2 pi turns), the phase rounded to 2^bits levels, or not."""
    if bits is not None:
        turns = (turns * 2**bits).round() / 2**bits
    return torch.polar(torch.ones_like(turns), 2.0 * math.pi * turns)


def draw_symbols(
    rng: np.random.Generator,
    power: torch.Tensor,
    *,
    snapshots: int,
    coherent: bool | torch.Tensor,
) -> torch.Tensor:
    """Draw the symbols s_l ~ CN(0, P), new in every snapshot, or one for all when coherent.

    Args:
        rng: source of randomness.
        power: [B, K], 0 in the empty slots.
        snapshots: L.
        coherent: True makes the sources fully coherent in time (rank 1 over the snapshots); or
            [B] bool, scene by scene.

    Returns:
        [B, L, K] complex128.
    """
    count, slots = power.shape
    once = coherent is True
    s_BLK = draw_normal(rng, (count, 1 if once else snapshots, slots))
    if isinstance(coherent, torch.Tensor):
        s_BLK = torch.where(coherent[:, None, None], s_BLK[:, :1], s_BLK)
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
