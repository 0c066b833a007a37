"""Channel: scaling, codes, symbols and the definition of the SNR."""

import numpy as np
import pytest
import torch

from ris_model.channel import (
    _form_line_of_sight,
    add_noise,
    draw_channel,
    draw_normal,
    draw_symbols,
    list_codes,
    mix_rician,
    observe,
)
from ris_model.config import PRESETS

FULL = PRESETS["full"].scenario
TINY = PRESETS["tiny"].scenario


def energy(h: torch.Tensor) -> torch.Tensor:
    """Squared Frobenius norm."""
    return h.abs().square().sum((-2, -1))


def test_line_of_sight_and_scatter_have_the_same_norm():
    """Both have the squared norm N, the line of sight exactly and with rank 1."""
    rng = np.random.default_rng(0)
    los = _form_line_of_sight(rng, FULL, count=20)
    scatter = draw_normal(rng, (200, FULL.antennas, FULL.elements)) / FULL.antennas**0.5
    assert torch.allclose(energy(los), torch.full((20,), 144.0, dtype=torch.float64))
    assert energy(scatter).mean().item() == pytest.approx(144.0, rel=0.01)
    assert torch.linalg.svdvals(los)[:, 1].max() < 1e-10


@pytest.mark.parametrize("k_db", [-10.0, 0.0, 5.0])
def test_rician_factor_is_the_ratio_of_energies(k_db):
    """The share of the line of sight is kf / (kf + 1), and the mean energy stays N."""
    rng = np.random.default_rng(1)
    los = _form_line_of_sight(rng, FULL, count=400)
    scatter = draw_normal(rng, (400, FULL.antennas, FULL.elements)) / FULL.antennas**0.5
    h = mix_rician(los, scatter, k_db=torch.full((400,), k_db, dtype=torch.float64))
    along = ((h * los.conj()).sum((-2, -1)) / 144).real.square().mean()
    kf = 10 ** (k_db / 10)
    # the scatter's own share along a rank-1 direction is 1 / (N M), below a per mille
    assert along.item() == pytest.approx(kf / (kf + 1), rel=0.02)
    assert energy(h).mean().item() == pytest.approx(144.0, rel=0.02)


def test_channels_differ_from_scene_to_scene():
    """Every scene has a channel of its own, of shape [B, M, N]."""
    h = draw_channel(np.random.default_rng(2), TINY, count=3)
    assert h.shape == (3, 4, 16)
    assert (h[0] - h[1]).abs().max() > 0.1


@pytest.mark.parametrize("preset", PRESETS)
def test_codes_have_unit_modulus_few_phases_and_no_repeats(preset):
    """Codes are quantised phases, L different ones."""
    scenario = PRESETS[preset].scenario
    codes = list_codes(scenario)
    steps = codes.angle() / (2 * np.pi / 2**scenario.code_bits)
    assert torch.allclose(codes.abs(), torch.ones_like(codes.abs()))
    assert (steps - steps.round()).abs().max() < 1e-9
    assert len({tuple(row) for row in codes.numpy().round(6).tolist()}) == scenario.snapshots


def test_symbols_are_new_in_every_snapshot_unless_coherent():
    """i.i.d. symbols have the rank of the sources, coherent ones rank 1."""
    power = torch.ones(2, 3, dtype=torch.float64)
    ranks = [
        torch.linalg.matrix_rank(
            draw_symbols(np.random.default_rng(3), power, snapshots=8, coherent=coherent)
        ).tolist()
        for coherent in (False, True)
    ]
    assert ranks == [[3, 3], [1, 1]]


def test_symbols_have_the_power_asked_for():
    """The mean of |s|^2 is the power; an empty slot sends nothing."""
    power = torch.tensor([[4.0, 0.0]], dtype=torch.float64)
    s = draw_symbols(np.random.default_rng(4), power, snapshots=20_000, coherent=False)
    assert s[..., 0].abs().square().mean().item() == pytest.approx(4.0, rel=0.03)
    assert s[..., 1].abs().max() == 0


def test_observation_is_the_written_product():
    """y_l = H diag(c_l) A s_l, element by element."""
    rng = np.random.default_rng(5)
    h, codes = draw_normal(rng, (2, 4, 16)), draw_normal(rng, (8, 16))
    a, s = draw_normal(rng, (2, 3, 16)), draw_normal(rng, (2, 8, 3))
    y = observe(h, codes, steering=a, symbols=s)
    assert torch.allclose(y[1, 5], h[1] @ torch.diag(codes[5]) @ a[1].T @ s[1, 5])


@pytest.mark.parametrize("snr", [-5.0, 20.0])
def test_snr_is_mean_clean_power_over_noise_power(snr):
    """The noise that was added has the variance that is reported."""
    rng = np.random.default_rng(6)
    clean = 3.0 * draw_normal(rng, (1, 400, 50))
    noisy, variance = add_noise(rng, clean, snr_db=torch.tensor([snr], dtype=torch.float64))
    measured = (noisy - clean).abs().square().mean()
    assert measured.item() == pytest.approx(variance.item(), rel=0.03)
    ratio = 10 * (clean.abs().square().mean() / variance[0]).log10()
    assert ratio.item() == pytest.approx(snr, abs=1e-9)
