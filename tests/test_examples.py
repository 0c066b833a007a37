"""The examples run, and say what their first lines promise."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from nanhunt.cli import main

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_own_model(capsys):
    """The masked branch is found on its line."""
    report = runpy.run_path(str(EXAMPLES / "own_model.py"))["main"]()
    [culprit] = report.culprits
    assert (culprit.op, culprit.node) == ("aten::log", "LogBackward0")
    assert culprit.cause == "masked_branch_backward"
    assert "torch.where" in culprit.source
    assert "CULPRIT" in capsys.readouterr().out


def test_subject_file(monkeypatch, capsys):
    """The command of its docstring takes effect and finds what cures."""
    file = EXAMPLES / "subject.py"
    [options] = re.findall(r"nanhunt replay examples/subject\.py:build (.*)`", file.read_text())
    words = ["nanhunt", "replay", f"{file}:build", *options.split()]
    monkeypatch.setattr(sys, "argv", [*words, "--precision", "fp64"])
    with pytest.raises(SystemExit) as left:
        main()
    out = capsys.readouterr().out
    assert left.value.code == 0
    assert re.search(r"− w_spread +yes .*cures: finite", out)
    assert "sqrt, in its backward" in out


@pytest.mark.filterwarnings("default")  # other people's packages warn as they please
@pytest.mark.parametrize(
    ("framework", "said"),
    [
        ("lightning", r"div, in the forward"),
        ("transformers", "infeasible_target"),
        ("accelerate", "sqrt, in its backward"),
    ],
)
def test_watched_frameworks(framework, said, capfd):
    """The failing step is withheld and its report printed; the others are taken."""
    pytest.importorskip(framework)
    runpy.run_path(str(EXAMPLES / f"watch_{framework}.py"))["main"]()
    out, err = capfd.readouterr()
    assert re.search(said, err)
    assert "[0, 1, 2, 4, 5]" in out or re.search(r"step 3: grad.*\nstep 4: the step was taken", out)


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda f: f.name)
def test_examples_are_short(file):
    """An example can be read in a minute."""
    assert len(file.read_text().splitlines()) <= 60
