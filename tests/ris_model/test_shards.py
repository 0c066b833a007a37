"""Shards: there and back, resumed, refused, streamed."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from ris_model.config import PRESETS
from ris_model.data import Batch, draw_batch
from ris_model.shards import Plan, Stream, write_shards

WORLD = PRESETS["tiny"].scenario
PLAN = Plan(scenario=WORLD, split="train", seed=3, scenes=80, shard_size=32)


@pytest.fixture
def folder(tmp_path):
    """Three shards of 32, 32 and 16 scenes."""
    assert [new for _, new in write_shards(PLAN, tmp_path)] == [True, True, True]
    return tmp_path


def key(batch: Batch) -> list:
    """What tells scenes apart."""
    return [round(value, 5) for value in batch.snr_db.tolist()]


def test_shards_hold_the_scenes_that_are_drawn(folder):
    """Every tensor to the bit but the covariances, which are formed again in FP32."""
    stream = Stream(folder, "train", batch_size=32)
    drawn = draw_batch(WORLD, seed=3, split="train", index=1, size=32)
    stream._order = lambda _: iter([(1, np.arange(32))])
    read = stream.take(0)
    for field in fields(Batch):
        one, other = getattr(read, field.name), getattr(drawn, field.name)
        assert one.dtype == other.dtype
        if field.name in {"r_true", "r_samp"}:
            assert torch.allclose(one, other, atol=2e-4)
        else:
            assert torch.equal(one, other)


def test_epoch_has_every_scene_once_in_an_order_of_its_own(folder):
    """80 scenes in 10 batches; the next epoch and another seed have another order."""
    stream = Stream(folder, "train", batch_size=8)
    assert stream.batches == 10
    first = [value for batch in stream for value in key(batch)]
    second = [value for index in range(10, 20) for value in key(stream.take(index))]
    other = [
        value for batch in Stream(folder, "train", batch_size=8, seed=1) for value in key(batch)
    ]
    assert len(set(first)) == 80
    assert set(first) == set(second) == set(other)
    assert len({tuple(order) for order in (first, second, other)}) == 3


def test_batch_does_not_depend_on_who_asks(folder):
    """Any index first; parts of two processes make the whole."""
    whole = Stream(folder, "train", batch_size=12).take(4)
    stream = Stream(folder, "train", batch_size=12)
    stream.take(7)
    halves = [stream.take(4, part=slice(i * 6, i * 6 + 6)) for i in range(2)]
    for field in fields(Batch):
        joined = torch.cat([getattr(half, field.name) for half in halves])
        assert torch.allclose(joined, getattr(whole, field.name), atol=1e-5)


def test_interrupted_writing_is_resumed(folder):
    """Good shards are kept as they are, a missing one is made the same."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    PLAN.locate(folder, 1).unlink()
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert [new for _, new in write_shards(PLAN, folder)] == [False, True, False]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_broken_shard_is_named_and_refused(folder):
    """By the writer and by the stream; it is left as it is."""
    path = PLAN.locate(folder, 1)
    content = path.read_bytes()[:-7]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} is no whole shard"):
        list(write_shards(PLAN, folder))
    with pytest.raises(ValueError, match=rf"{path} is no whole shard"):
        Stream(folder, "train", batch_size=8)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (replace(PLAN, seed=4), "its seed is 3, not 4"),
        (replace(PLAN, shard_size=40), "its shard_size is 32, not 40"),
        (replace(PLAN, scenes=96), "its scenes is 16, not 32"),
        (replace(PLAN, scenario=replace(WORLD, snr_max=30.0)), "its snr_max is 20.0, not 30.0"),
    ],
)
def test_foreign_shard_is_named_and_refused(folder, plan, sentence):
    """With the first thing that differs."""
    with pytest.raises(
        ValueError, match=rf"train-0000\d.safetensors is a foreign shard: {sentence}"
    ):
        list(write_shards(plan, folder))


def test_stream_refuses_what_does_not_belong(folder, tmp_path):
    """Another scenario, a gap, no shards, too few scenes."""
    with pytest.raises(ValueError, match=r"foreign shard: its snapshots is 8, not 16$"):
        Stream(folder, "train", batch_size=8, scenario=replace(WORLD, snapshots=16))
    with pytest.raises(ValueError, match=r"holds 80 scenes of 'train', less than one batch$"):
        Stream(folder, "train", batch_size=81)
    with pytest.raises(ValueError, match=r"^there is no shard of the split 'val' in "):
        Stream(folder, "val", batch_size=8)
    PLAN.locate(folder, 0).unlink()
    with pytest.raises(
        ValueError, match=r"train-00001.* is a foreign shard: its index is 1, not 0$"
    ):
        Stream(folder, "train", batch_size=8)


def test_splits_share_no_scene(tmp_path):
    """The same seed, one folder."""
    keys = []
    for split in ("train", "val", "test"):
        list(write_shards(replace(PLAN, split=split), tmp_path))
        keys += [value for batch in Stream(tmp_path, split, batch_size=8) for value in key(batch)]
    assert len(set(keys)) == len(keys) == 240
