"""The examples run, and say what their first lines promise."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import nanhunt
from nanhunt.cli import main
from nanhunt.gate import template

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
def load(name):
    """The names of an example, without running it as a program."""
    return runpy.run_path(str(EXAMPLES / name))


def test_double_where():
    """The first step is cured by a second `where`, which is also the fix that is proven."""
    before, after = load("double_where.py")["main"]()
    assert (before.verdict, after.verdict) == ("culprit", "healthy")
    assert next(t.recipe for t in before.trials if t.is_proven) == "double_where"


def test_transformer_overflows_in_half_precision():
    """The product of the scores is the culprit, in FP16 alone; scaled first it is healthy."""
    torch.manual_seed(0)
    build = load("transformer_amp.py")["build"]
    report = nanhunt.hunt(build(), precisions=["native", "fp32"])
    [culprit] = report.culprits
    assert (culprit.op, culprit.cause, culprit.dtype) == (
        "aten::bmm", "overflow_low_precision", "float16",
    )  # fmt: skip
    assert culprit.source.startswith("scores =")
    assert [run.is_finite for run in report.runs] == [False, True]
    assert nanhunt.hunt(build(scaled=True), precisions=["native"]).verdict == "healthy"


def test_gradient_penalty():
    """The norm in the penalty is the culprit, in a second derivative, and its fix is proven."""
    report = nanhunt.hunt(load("gradient_penalty.py")["build"](), precisions=["native", "fp64"])
    [culprit] = report.culprits
    assert (culprit.op, culprit.terms) == ("aten::sqrt", ("penalty",))
    assert any(trial.is_proven for trial in report.trials)
    [without] = [each for each in report.ablations if each.mode == "without"]
    # The slope is taken in the forward: what is left there is no backward of the penalty.
    assert (without.names, without.took_effect, without.cures) == (("penalty",), True, True)
    assert without.ops_after[1] == 0


def test_workflow_gates_both_models(tmp_path, monkeypatch):
    """The command of the workflow passes, and writes what the next step uploads."""
    text = (EXAMPLES / "workflow.yml").read_text()
    [command] = re.findall(r"- run: (nanhunt gate .*)", text)
    [uploaded] = re.findall(r"sarif_file: (.*)", text)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    assert Path(uploaded).is_file()
    job = [line for line in template.JOB.splitlines() if "run:" not in line]
    assert [line for line in text.splitlines()[2:] if "run:" not in line] == job


@pytest.fixture(scope="module")
def executed():
    """The notebook of the incident, run anew from the top."""
    client = pytest.importorskip("nbclient", reason="nbclient is not installed (extra `test`)")
    import nbformat

    notebook = nbformat.read(EXAMPLES / "incident.ipynb", as_version=4)
    run = nbformat.from_dict(notebook)
    for cell in run.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client.NotebookClient(run, timeout=300, kernel_name="python3").execute()
    return notebook, run


def kinds(notebook):
    """Of every code cell the kinds of its outputs."""
    return [
        [sorted(out.get("data", {"text": ""})) for out in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_notebook_runs_as_it_was_kept(executed):
    """Every cell runs, and gives outputs of the kinds that are kept in the file."""
    kept, run = executed
    assert kinds(run) == kinds(kept)
    told = "".join(str(cell.get("outputs", "")) for cell in run.cells)
    assert "lam_subspace_align took effect: False" in told
    assert "gap_only_projector proven" in told


def test_report_shows_itself_in_a_notebook(executed):
    """A report at the end of a cell is a page in a frame, and short text where there is no HTML."""
    _, run = executed
    shown = [
        out["data"]
        for cell in run.cells
        for out in cell.get("outputs", ())
        if "text/html" in out.get("data", {})
    ]
    assert shown
    for data in shown:
        assert data["text/html"].startswith('<iframe sandbox="" srcdoc=')
        assert "the loss is finite" in data["text/plain"]


def test_kept_notebook_tells_nothing_of_a_machine():
    """No path of the machine on which it was run stands in the file, which stays small."""
    text = (EXAMPLES / "incident.ipynb").read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|work|tmp|Users)/", text)
    assert len(text) < 1_000_000


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.*")), ids=lambda f: f.name)
def test_examples_are_short(file):
    """An example can be read in a minute."""
    if file.suffix == ".ipynb":
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        lines = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    else:
        lines = [file.read_text(encoding="utf-8")]
    assert len("\n".join(lines).splitlines()) <= 60
