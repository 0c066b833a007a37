"""Evaluation: tables, figures, a user's own data, and the commands for them."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ris_model.__main__ import app
from ris_model.config import PRESETS, apply_profile
from ris_model.data import draw_batch
from ris_model.evaluation.figures import plot_errors, plot_spectra
from ris_model.evaluation.methods import gather_tools, list_methods
from ris_model.evaluation.prediction import predict, read_file
from ris_model.evaluation.table import Request, draw_scenes, evaluate
from ris_model.evaluation.text import describe_scenes, write_table
from ris_model.geometry import place_points
from ris_model.network import Detector

ROOT = Path(__file__).parents[2]
TINY = apply_profile(PRESETS["tiny"], "sound")
SMALL = apply_profile(PRESETS["small"], "sound")


@pytest.fixture(scope="module")
def tools():
    """Tools of a network that was never trained."""
    torch.manual_seed(0)
    return gather_tools(TINY, Detector(TINY))


@pytest.fixture(scope="module")
def table(tools):
    """Every method on a few tiny scenes."""
    return evaluate(tools, Request((10.0,), (1, 2), scenes=4, slow_scenes=2))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run of one step."""
    out = tmp_path_factory.mktemp("checkpoint") / "run"
    command = ["train", "--preset", "tiny", "--steps", "1", "--out", str(out)]
    ran = CliRunner().invoke(app, command)
    assert ran.exit_code == 0, ran.output
    return out


def write_file(path: Path, **changes: object) -> Path:
    """Measurements of two small scenes, 25 dB, with changes; None leaves an array out."""
    scenario = replace(SMALL.scenario, snr_min=25.0, snr_max=25.0)
    batch = draw_batch(scenario, seed=5, split="test", index=0, size=2)
    arrays = {"y": batch.y.numpy(), "H": batch.h.numpy(), "codes": batch.codes.numpy()}
    arrays = {k: v for k, v in (arrays | changes).items() if v is not None}
    np.savez(path, **arrays)
    return path


def test_scenes_have_their_sources_and_come_in_batches():
    """As many as are asked for, all of the same K."""
    batches = draw_scenes(TINY.scenario, sources=2, scenes=100, seed=0)
    assert [batch.samples for batch in batches] == [64, 36]
    assert {int(k) for batch in batches for k in batch.count} == {2}


def test_every_method_has_a_row(tools, table):
    """For each K and SNR, with figures that are finite, and the bound beside them."""
    names = list(list_methods(tools, sources=1))
    assert [row.method for row in table.rows] == names * 2
    assert [(bound.sources, bound.snr_db) for bound in table.bounds] == [(1, 10.0), (2, 10.0)]
    for row in table.rows:
        assert row.ms > 0
        assert math.isfinite(row.figures.gospa)
        assert row.figures.scenes == (2 if row.method[:2] in {"ML", "MU", "MV"} else 4)
    known = [row for row in table.rows if row.method == "image + fit, K known"]
    assert [row.figures.right for row in known] == [1.0, 1.0]


def test_without_a_network_its_rows_are_left_out():
    """Nothing is asked that is not there."""
    tools = gather_tools(TINY)
    assert not [name for name in list_methods(tools, sources=1) if name.startswith("network")]
    batch = draw_batch(TINY.scenario, seed=0, split="test", index=0, size=1)
    with pytest.raises(ValueError, match=r"^there is no network to take candidates from$"):
        tools.locate(batch, network=True)


def test_lines_are_aligned_and_name_the_scenes(table):
    """K-factor and pair rule stand beside every table; columns have one width."""
    assert describe_scenes(SMALL.scenario).startswith("K-factor -10 to 5 dB, pairs of |<a1, a2>|")
    lines = [line for line in write_table(table) if line.startswith("|")]
    assert len({len(line) for line in lines}) <= 2
    assert sum("0.674 sqrt(CRB)" in line for line in lines) == 2


def test_figures_are_written(tools, table, tmp_path):
    """One for each K, and the spectra of a scene."""
    (batch, *_) = draw_scenes(TINY.scenario, sources=2, scenes=1, seed=0)
    paths = [*plot_errors(table, tmp_path), plot_spectra(tools, batch, tmp_path)]
    assert [path.name for path in paths] == ["errors-k1.png", "errors-k2.png", "spectrum.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_a_users_file_gives_sources_with_bars(tmp_path):
    """Within five standard deviations of the truth; H and codes may be given in parts."""
    scenario = replace(SMALL.scenario, snr_min=25.0, snr_max=25.0)
    batch = draw_batch(scenario, seed=5, split="test", index=0, size=2)
    split = torch.view_as_real(batch.y).numpy()
    readings = read_file(write_file(tmp_path / "a.npz", y=split), SMALL.scenario)
    largest = torch.view_as_real(batch.y).abs().amax((1, 2, 3))[:, None, None]
    assert torch.allclose(readings.y * largest, batch.y)
    found = predict(gather_tools(SMALL), readings)
    assert [source.scene for source in found] == [
        scene for scene in range(2) for _ in range(int(batch.count[scene]))
    ]
    for source in found:
        truth = batch.points[source.scene, : int(batch.count[source.scene])]
        place = place_points(torch.tensor(source.point))
        nearest = truth[(place_points(truth) - place).square().sum(-1).argmin()]
        gap = (torch.tensor(source.point) - nearest).abs()
        assert (gap < 5 * torch.tensor(source.bar)).all()
        assert source.snr_db > 5


@pytest.mark.parametrize("unit", [1e-200, 1e-6, 1e200])
def test_the_unit_of_a_file_does_not_matter(tmp_path, unit):
    """Volts or what a converter counts: the same places, bars and SNR, also beyond FP32."""
    plain = read_file(write_file(tmp_path / "a.npz"), SMALL.scenario)
    y, h = (t.numpy().astype(complex) * unit for t in (plain.y, plain.h))
    scaled = read_file(write_file(tmp_path / "b.npz", y=y, H=h), SMALL.scenario)
    assert torch.allclose(scaled.y, plain.y, rtol=1e-5)
    assert torch.allclose(scaled.h, plain.h, rtol=1e-5)


def test_one_scene_may_come_without_its_dimension(tmp_path):
    """[L, M] with [M, N] and [L, N]."""
    whole = read_file(write_file(tmp_path / "a.npz"), SMALL.scenario)
    parts = {"y": whole.y[0].numpy(), "H": whole.h[0].numpy(), "codes": whole.codes[0].numpy()}
    one = read_file(write_file(tmp_path / "b.npz", **parts), SMALL.scenario)
    assert torch.equal(one.y, whole.y[:1])
    assert torch.equal(one.codes, whole.codes[:1])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"H": None}, r"has no H but codes, y; give y \[L, M\]"),
        ({"y": np.zeros((2, 3))}, r"y is float64 of shape \[2, 3\]; give y"),
        ({"H": np.zeros((8, 35), complex)}, r"H has 35 and codes have 36 elements .* 6 x 6 = 36"),
        ({"y": np.zeros((2, 16, 7), complex)}, r"y \[2, 16, 7\] does not fit H \[2, 8, 36\]"),
        ({"y": np.full((2, 16, 8), np.nan + 0j)}, r"y holds 256 numbers that are not finite"),
        ({"y": np.zeros((3, 16, 8), complex)}, r"H has 2 scenes, y has 3; give 1 or 3"),
        ({"y": np.zeros((2, 16, 8), complex)}, r"y of scene 0 is all zero; give scenes in which"),
        ({"H": np.zeros((8, 36), complex)}, r"H of scene 0 is all zero; give scenes in which"),
        ({"codes": np.full((16, 36), 0.5 + 0j)}, r"moduli up to 0.5 away from 1; give pure"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path, change, sentence):
    """What is wrong, what came, what would do."""
    path = write_file(tmp_path / "a.npz", **change)
    with pytest.raises(ValueError, match=sentence):
        read_file(path, SMALL.scenario)


def test_what_is_no_npz_is_refused(tmp_path):
    """Neither text nor a pickle is read."""
    path = tmp_path / "a.npz"
    path.write_text("no archive", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a.npz is no npz file; write one with numpy.savez"):
        read_file(path, SMALL.scenario)
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"a.npy is no npz file; write one with numpy.savez"):
        read_file(tmp_path / "a.npy", SMALL.scenario)
    whole = write_file(path).read_bytes()
    path.write_bytes(whole[:200] + bytes([whole[200] ^ 255]) + whole[201:])
    with pytest.raises(ValueError, match=r"a.npz cannot be read as npz \(Bad CRC-32"):
        read_file(path, SMALL.scenario)
    with pytest.raises(ValueError, match=r"^there is no file .*nothing.npz; give an npz"):
        read_file(tmp_path / "nothing.npz", SMALL.scenario)


def test_commands_on_a_checkpoint(checkpoint, tmp_path):
    """`evaluate` prints tables and writes figures; `predict` prints sources."""
    command = ["evaluate", str(checkpoint), "--snr", "10", "--sources", "1", "--scenes", "4"]
    figures = tmp_path / "figures"
    ran = CliRunner().invoke(app, [*command, "--slow-scenes", "0", "--plot", str(figures)])
    assert ran.exit_code == 0, ran.output
    assert "| network + fit " in ran.stdout
    assert ran.stderr == "K = 1, 10 dB ...\n"
    assert {path.name for path in figures.iterdir()} == {"errors-k1.png", "spectrum.png"}
    batch = draw_batch(TINY.scenario, seed=0, split="test", index=0, size=1)
    np.savez(tmp_path / "a.npz", y=batch.y, H=batch.h, codes=batch.codes)
    ran = CliRunner().invoke(app, ["predict", str(checkpoint), str(tmp_path / "a.npz")])
    assert ran.exit_code == 0, ran.output
    assert "azimuth" in ran.stdout


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["evaluate", "nowhere"], "ris-model: "),
        (["evaluate", "CKPT", "--snr", "x"], "--snr is 'x'; give numbers separated by commas"),
        (["evaluate", "CKPT", "--sources", "3"], "--sources is '3'; give whole numbers from 1 to"),
        (["evaluate", "CKPT", "--scenes", "0"], "--scenes is 0; give a whole number from 1"),
        (
            ["predict", "CKPT", "nothing.npz", "--position-error", "2"],
            "--position-error is 2; give a number from 0 to 1",
        ),
        (["predict", "CKPT", "nothing.npz"], "there is no file nothing.npz; give an npz"),
    ],
)
def test_wrong_input_is_answered_by_a_sentence(checkpoint, options, sentence):
    """Exit code 2, no traceback."""
    given = [str(checkpoint) if option == "CKPT" else option for option in options]
    ran = CliRunner().invoke(app, given)
    assert ran.exit_code == 2
    assert sentence in ran.stderr
    assert "Traceback" not in ran.output


def test_the_benchmark_names_its_parts():
    """The program behind the figures of the docs starts."""
    command = [sys.executable, "benchmarks/ris.py", "nothing"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "parts are main, count, robust, timing, bound, full" in ran.stderr
