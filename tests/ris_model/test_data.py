"""Data: determinism, disjoint splits, labels."""

import hashlib
import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from ris_model.config import PRESETS, SPLITS
from ris_model.data import Batch, draw_batch, seed_batch
from ris_model.geometry import place_elements, steer

TINY = PRESETS["tiny"].scenario

DIGEST = """
import hashlib
from ris_model.config import PRESETS
from ris_model.data import draw_batch
batch = draw_batch(PRESETS["tiny"].scenario, seed=3, split="train", index=0, size=4)
print(hashlib.sha256(batch.y.numpy().tobytes()).hexdigest())
"""


def draw(index: int = 0, split: str = "train", seed: int = 0, **changes: object) -> Batch:
    """A small batch."""
    return draw_batch(replace(TINY, **changes), seed=seed, split=split, index=index, size=4)


def test_every_tensor_is_single_precision_with_scenes_in_front():
    """Scenes come first, precision is FP32 or complex64, everything is finite."""
    batch = draw()
    for field in fields(batch):
        tensor = getattr(batch, field.name)
        assert tensor.shape[0] == batch.samples == 4
        assert tensor.dtype in {torch.float32, torch.complex64, torch.int64}
        assert tensor.isfinite().all()


def test_batch_is_the_same_after_any_other_calls():
    """Neither other batches nor the global generators change batch 0."""
    first = draw()
    draw(index=5)
    torch.manual_seed(7)
    np.random.default_rng().random(3)
    again = draw()
    assert all(torch.equal(getattr(first, f.name), getattr(again, f.name)) for f in fields(first))


def test_batch_is_the_same_in_another_process():
    """A fresh interpreter makes the same bits."""
    command = [sys.executable, "-c", DIGEST]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    here = draw_batch(TINY, seed=3, split="train", index=0, size=4).y.numpy().tobytes()
    assert run.stdout.strip() == hashlib.sha256(here).hexdigest()


def test_splits_batches_and_seeds_are_disjoint():
    """No scene of one (seed, split, index) occurs in another."""
    drawn = [
        draw(index=index, split=split, seed=seed)
        for seed in (0, 1, 123)
        for split in SPLITS
        for index in (0, 1, 123)
    ]
    scenes = torch.cat([batch.y for batch in drawn]).flatten(1)
    assert len({tuple(scene.tolist()) for scene in scenes}) == len(scenes)


def test_generator_is_the_spawned_child():
    """The key is the walk through SeedSequence.spawn."""
    child = np.random.SeedSequence(9).spawn(3)[1].spawn(5)[4]
    expected = np.random.default_rng(child).random(3)
    assert np.array_equal(seed_batch(9, "val", 4).random(3), expected)


def test_labels_follow_from_ptr_and_power():
    """R_true rebuilt from angles, ranges and powers is the label, at trace N."""
    batch = draw()
    a = steer(place_elements(TINY).float(), batch.points, wavenumber=TINY.wavenumber)
    r = (a * batch.power[..., None]).mT @ a.conj()
    r = r * (16 / r.diagonal(dim1=-2, dim2=-1).sum(-1).real)[:, None, None]
    assert torch.allclose(r, batch.r_true, atol=1e-4)


def test_empty_slots_hold_zeros_and_sources_lie_in_their_ranges():
    """Padding is 0 in labels; the others are inside the preset's limits."""
    batch = draw_batch(TINY, seed=0, split="train", index=0, size=64)
    phi, theta, r = batch.ptr.view(64, 3, -1).unbind(1)
    active = batch.active
    assert set(batch.count.tolist()) == {1, 2}
    assert torch.equal(active.sum(-1), batch.count)
    for label in (phi, theta, r, batch.power):
        assert label[~active].abs().max() == 0
    assert phi.abs().max() <= TINY.azimuth_limit
    assert theta.abs().max() <= TINY.elevation_limit
    assert r[active].min() >= TINY.range_min
    assert r[active].max() <= TINY.range_max


def test_snapshots_follow_the_equation_and_the_snr():
    """Y less H diag(c) A s is noise of the reported variance."""
    batch = draw_batch(TINY, seed=0, split="train", index=0, size=64)
    a = steer(place_elements(TINY).float(), batch.points, wavenumber=TINY.wavenumber)
    clean = (batch.codes * (batch.symbols @ a)) @ batch.h.mT
    noise = (batch.y - clean).abs().square().mean((-2, -1))
    power = clean.abs().square().mean((-2, -1))
    assert (noise / batch.noise_variance).mean().item() == pytest.approx(1.0, abs=0.05)
    measured = 10 * (power / batch.noise_variance).log10()
    assert torch.allclose(measured, batch.snr_db, atol=1e-2)


def test_the_snr_of_a_single_source_is_that_of_the_sum():
    """A scene with one source has one SNR."""
    batch = draw_batch(TINY, seed=0, split="train", index=0, size=64)
    alone = batch.count == 1
    assert torch.allclose(batch.source_snr_db[alone, 0], batch.snr_db[alone], atol=1e-3)


def test_coherent_symbols_are_an_option():
    """Coherent: every snapshot repeats the first symbol."""
    assert (draw(coherent=True).symbols - draw(coherent=True).symbols[:, :1]).abs().max() == 0
    assert (draw().symbols - draw().symbols[:, :1]).abs().max() > 0


def test_second_order_steering_changes_the_labels():
    """The option reaches the data."""
    assert not torch.allclose(draw().r_true, draw(steering="second-order").r_true, atol=1e-2)
