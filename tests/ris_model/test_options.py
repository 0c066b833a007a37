"""Options of a scenario: each changes what it names, and nothing of the other draws."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from ris_model.channel import disturb_channel, disturb_codes, disturb_positions, draw_codes
from ris_model.config import PRESETS
from ris_model.data import Batch, draw_batch
from ris_model.geometry import place_elements, steer

TINY = PRESETS["tiny"].scenario
SMALL = PRESETS["small"].scenario
# What the receiver knows and the labels say; the rest follows from the disturbed snapshots.
NOMINAL = ("h", "codes", "ptr", "count", "power", "symbols", "snr_db", "r_true")


def draw(size: int = 16, **changes: object) -> Batch:
    """A batch of tiny scenes."""
    return draw_batch(replace(TINY, **changes), seed=0, split="val", index=3, size=size)


def list_changed(**changes: object) -> set[str]:
    """Names of the tensors that differ from those of the plain scenario."""
    plain, changed = draw(), draw(**changes)
    pairs = ((f.name, getattr(plain, f.name), getattr(changed, f.name)) for f in fields(plain))
    return {name for name, a, b in pairs if not torch.equal(a, b)}


@pytest.mark.parametrize(
    "change",
    [
        {"position_error": 0.05},
        {"code_phase_error": 0.04},
        {"code_amplitude_error": 0.05},
        {"code_dropout": 0.2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_receiver_is_not_told_of_errors(change):
    """Errors of surface and codes reach the snapshots, not the labels nor what is known."""
    changed = list_changed(**change)
    assert {"y", "noise_variance", "r_samp"} <= changed
    assert changed.isdisjoint(NOMINAL)


def test_the_receiver_has_another_channel():
    """A channel error leaves the snapshots and changes the channel that is handed over."""
    assert list_changed(channel_error=-20.0) == {"h", "r_samp"}
    difference = draw(channel_error=-20.0).h - draw().h
    share = difference.abs().square().mean() / draw().h.abs().square().mean()
    assert 10 * share.log10().item() == pytest.approx(-20.0, abs=0.5)


def test_errors_have_their_sizes():
    """Standard deviations, probabilities and reaches are those of the scenario."""
    rng = np.random.default_rng(0)
    wrong = replace(TINY, code_phase_error=0.04, code_amplitude_error=0.05, code_dropout=0.03)
    codes = draw_codes(rng, TINY, count=500)
    ratio = disturb_codes(rng, codes, wrong) / codes
    works = ratio.abs() > 0
    assert works.double().mean().item() == pytest.approx(0.97, abs=0.003)
    assert ratio[works].angle().std().item() == pytest.approx(0.04, rel=0.02)
    assert ratio[works].abs().std().item() == pytest.approx(0.05, rel=0.02)
    moved = disturb_positions(rng, replace(TINY, position_error=0.05), count=500)
    assert (moved - place_elements(TINY)).abs().max() <= 0.05 * 0.15
    assert (moved - place_elements(TINY)).std().item() == pytest.approx(
        0.05 * 0.15 / 3**0.5, rel=0.02
    )
    h = torch.ones(1, 4, 16, dtype=torch.complex128)
    assert disturb_channel(rng, h, error_db=None) is h


@pytest.mark.parametrize(("bits", "levels"), [(1, 2), (2, 4), (3, 8), (None, 8)])
def test_dft_codes_take_the_phases_of_their_bits(bits, levels):
    """Beams of a pool of 8 have 8 phases at most; fewer bits leave fewer."""
    scenario = replace(SMALL, codebook="dft", code_bits=bits)
    phases = draw_codes(np.random.default_rng(0), scenario, count=1).angle()
    turns = (phases / (2 * torch.pi) * 8).remainder(8).round(decimals=6).remainder(8)
    assert len(turns.unique()) == levels


@pytest.mark.parametrize(("bits", "levels"), [(1, 2), (2, 4), (3, 8)])
def test_random_codes_are_new_in_every_scene(bits, levels):
    """Quantised, of modulus 1, and no two scenes alike."""
    scenario = replace(SMALL, code_bits=bits)
    codes = draw_codes(np.random.default_rng(0), scenario, count=3)
    assert torch.allclose(codes.abs(), torch.ones(()).double())
    turns = (codes.angle() / (2 * torch.pi) * levels).remainder(levels).round(decimals=6)
    assert len(turns.remainder(levels).unique()) == levels
    assert (codes[0] - codes[1]).abs().max() > 1


def test_continuous_random_codes_have_no_levels():
    """Without bits, all phases differ."""
    codes = draw_codes(np.random.default_rng(0), replace(SMALL, code_bits=None), count=1)
    assert len(codes.angle().unique()) == codes.numel()


def test_coherent_scenes_have_their_share():
    """About half of the scenes repeat their first symbol, the others do not."""
    batch = draw(400, coherent_share=0.5)
    same = (batch.symbols == batch.symbols[:, :1]).all(-1).all(-1)
    assert 0.4 < same.double().mean() < 0.6
    assert list_changed(coherent_share=1.0) >= {"y", "symbols"}


def test_sources_are_weakened_by_up_to_the_spread():
    """Near-far: uniform in dB, in the share of the scenes; the SNR of each source shows it."""
    batch = draw(400, power_law="equal", power_spread=10.0, spread_share=0.5)
    level = 10 * (batch.power / TINY.gain**2)[batch.active].log10()
    assert -10.0 <= level.min() < -9.0
    assert level.max() == 0.0
    assert 0.35 < (level < 0).double().mean() < 0.65
    pair = batch.count == 2
    gap = (batch.source_snr_db[pair, 0] - batch.source_snr_db[pair, 1]).abs()
    assert gap.mean() > 1.5


def test_equal_powers_do_not_depend_on_the_range():
    """Every source has the power of the gain."""
    batch = draw(power_law="equal")
    assert torch.equal(batch.power[batch.active], torch.full((batch.active.sum(),), 1e6))


def test_pairs_keep_their_correlation():
    """|<a1, a2>| stays below the limit; scenes that kept it anyhow are as they were."""
    plain, parted = draw(200), draw(200, correlation_max=0.3)
    pair = plain.count == 2
    found = []
    for batch in (plain, parted):
        a = steer(place_elements(TINY).float(), batch.points, wavenumber=TINY.wavenumber)
        found.append((a[:, 0].conj() * a[:, 1]).sum(-1).abs())
    assert found[0][pair].max() > 0.3
    assert found[1][pair].max() < 0.3
    kept = ~pair | (found[0] < 0.3)
    assert torch.equal(plain.ptr[kept], parted.ptr[kept])


def test_correlation_that_cannot_be_kept_is_refused():
    """One sentence with the number of sources and what to change."""
    match = r"^2 sources with correlations below 0.0001 were not found in 100 draws; raise corr"
    with pytest.raises(ValueError, match=match):
        draw(64, correlation_max=1e-4)
