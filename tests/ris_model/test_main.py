"""The command line: what it prints and its exit codes."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from ris_model.__main__ import app


def invoke(*arguments: str):
    """Run a command in this process."""
    return CliRunner().invoke(app, list(arguments))


def test_describe_shows_the_array_and_the_parameters():
    """Distances and parameter counts of the preset."""
    result = invoke("describe", "--preset", "tiny")
    assert result.exit_code == 0
    for text in ("4 x 4 = 16", "0.15 m", "0.64 m", "2.7 m", "27,549", "14,576", "12,973", "5,346"):
        assert text in result.output


def test_describe_shows_the_sound_network():
    """Every parameter of it gets a gradient."""
    output = invoke("describe", "--preset", "tiny", "--profile", "sound").output
    assert [line.split()[-2] for line in output.splitlines() if "gradient" in line] == ["0"]
    for text in ("ris_model, sound, preset tiny", "5,019", "2,808", "2,211"):
        assert text in output


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_step_prints_the_lines_of_the_case_report(amp):
    """A finite loss, NaN in both groups, no step, exit code 0."""
    result = invoke("step", "--preset", "tiny", "--amp", amp)
    lines = result.output.splitlines()
    tail = lines[12:]
    assert result.exit_code == 0
    assert lines[10].startswith("align")
    assert not any(line.startswith("subspace_align") for line in lines)
    assert tail[0] == "[LOSS DEBUG] Subspace align: DISABLED (weight=0.0)"
    assert tail[1].startswith("[DEBUG] Loss is finite: 3.")
    assert tail[2] == "[GRAD] backbone=nan head=nan ok=False"
    assert tail[3:-1] == (["[AMP] scale=65536 found_inf=1"] if amp == "fp16" else [])
    assert tail[-1] == "[STEP] Non-finite gradients detected, skipping step and zeroing grads"


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_sound_step_is_made(amp):
    """Fifteen terms, finite norms, nothing skipped."""
    result = invoke("step", "--preset", "tiny", "--profile", "sound", "--amp", amp)
    lines = result.output.splitlines()
    assert result.exit_code == 0
    assert [line.split()[0] for line in lines[13:15]] == ["heatmap", "offset"]
    assert lines[15] == "[LOSS DEBUG] Subspace align: ENABLED (weight=0.02)"
    assert lines[16].startswith("[DEBUG] Loss is finite: 8.78")
    assert lines[17].startswith("[GRAD] backbone=3.")
    assert lines[17].endswith("ok=True")
    assert lines[18:] == (["[AMP] scale=1024 found_inf=0"] if amp == "fp16" else [])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("step", "--preset", "huge"), "there is no preset 'huge'"),
        (("describe", "--preset", "huge"), "there is no preset 'huge'"),
        (("step", "--batch", "-1"), "there is no batch -1"),
        (("step", "--amp", "fp8"), "amp='fp8' is not known"),
        (("step", "--profile", "x"), "there is no profile 'x'"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_two(arguments, sentence):
    """No traceback."""
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"ris-model: {sentence}")
    assert len(result.stderr.splitlines()) == 1


def test_importing_the_command_line_leaves_torch_alone():
    """Torch is imported when a command runs, not before."""
    code = "import sys, ris_model.__main__; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
