"""Storage: whole files, refused ones, records there and back."""

import os
from dataclasses import asdict, replace

import pytest
import torch

from ris_model.config import PRESETS, Config, Scenario, Training
from ris_model.storage import (
    hash_record,
    read_fields,
    read_record,
    read_tensors,
    write_tensors,
    write_whole,
)

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "z": torch.randn(2, 3, dtype=torch.complex64).mH,
    "count": torch.tensor(3),
    "state": torch.arange(5, dtype=torch.uint8),
    "none": torch.zeros(0, 4),
}


@pytest.fixture
def file(tmp_path):
    """A file of every kind of tensor."""
    path = tmp_path / "deep" / "one.safetensors"
    write_tensors(path, TENSORS, form="checkpoint", record={"step": 3})
    return path


def test_tensors_and_record_come_back_equal(file):
    """Dtypes, shapes and bits, complex and empty tensors too."""
    tensors, record = read_tensors(file, form="checkpoint")
    assert record == read_record(file, form="checkpoint") == {"step": 3}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_nothing_else_is_left_in_the_folder(file):
    """The part beside it became the file."""
    assert [p.name for p in file.parent.iterdir()] == ["one.safetensors"]


def test_failed_write_leaves_the_old_file(file, monkeypatch):
    """A full disk, say: the old contents stay and no part is left."""
    before = file.read_bytes()

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, b"new")
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == ["one.safetensors"]


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file_is_refused(file, keep):
    """Wherever it was cut."""
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{file} is no whole checkpoint \(.*delete it$"):
        read_tensors(file, form="checkpoint")


def test_flipped_bit_is_refused(file):
    """The length is right, the contents are not."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"checksum does not fit its contents"):
        read_tensors(file, form="checkpoint")


def test_other_files_are_refused(file, tmp_path):
    """None, another form, another version, text."""
    with pytest.raises(ValueError, match=r"^there is no shard .*absent$"):
        read_record(tmp_path / "absent", form="shard")
    with pytest.raises(ValueError, match=r"is no shard of ris-model but checkpoint$"):
        read_record(file, form="shard")
    file.write_bytes(file.read_bytes().replace(rb"\"version\": 1", rb"\"version\": 9"))
    with pytest.raises(ValueError, match=r"is a checkpoint of version 9; this program reads"):
        read_record(file, form="checkpoint")
    file.write_text("no tensors at all")
    with pytest.raises(ValueError, match="is no whole checkpoint"):
        read_record(file, form="checkpoint")


@pytest.mark.parametrize("preset", PRESETS)
def test_configuration_comes_back_equal(preset, tmp_path):
    """Through JSON, tuples and nested records included."""
    path = tmp_path / "c"
    write_tensors(path, {}, form="c", record=asdict(PRESETS[preset]))
    assert read_fields(Config, read_record(path, form="c")) == PRESETS[preset]


def test_missing_fields_take_their_defaults():
    """An older file lacks a newer field."""
    values = asdict(PRESETS["tiny"].training)
    del values["warmup"]
    assert read_fields(Training, values) == PRESETS["tiny"].training


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"speed": 1}, r"Training has no field 'speed'; it has batch_size, "),
        ({"batch_size": "many"}, r"Training.batch_size is 'many'; give int$"),
        ({"learning_rate": None}, r"Training.learning_rate is None; give float$"),
    ],
)
def test_unfit_fields_are_named(change, sentence):
    """With what came and what would do."""
    with pytest.raises(ValueError, match=sentence):
        read_fields(Training, {**asdict(PRESETS["tiny"].training), **change})


def test_unfit_records_are_named():
    """A missing field without a default, a closed set, no table at all."""
    scenario = asdict(PRESETS["tiny"].scenario)
    with pytest.raises(ValueError, match=r"Scenario.steering is 'flat'; give Literal\['exact'"):
        read_fields(Scenario, {**scenario, "steering": "flat"})
    with pytest.raises(ValueError, match=r"^Training is incomplete: .*'batch_size'"):
        read_fields(Training, {})
    with pytest.raises(ValueError, match=r"^Training is 3; give a table of its fields$"):
        read_fields(Training, 3)


def test_hash_tells_records_apart():
    """The same for the same values, another for others."""
    world = PRESETS["tiny"].scenario
    assert hash_record(world) == hash_record(replace(world)) == hash_record(asdict(world))
    assert hash_record(world) != hash_record(replace(world, snr_max=21.0))
