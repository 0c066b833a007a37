"""nanhunt is right about the zoo in `tests/cases`, and the benchmark's judge is fair.

The cases run as the benchmark runs them, each in a clean process, so that none sees what another
has switched on.
"""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CASES = ROOT / "tests" / "cases"
BENCHMARK = ROOT / "benchmarks" / "accuracy.py"

sys.path.append(str(BENCHMARK.parent))
accuracy = importlib.import_module("accuracy")
Answer, Named = accuracy.Answer, accuracy.Named

# Cases that nanhunt gets wrong, and why. One that it gets right must go.
KNOWN_MISSES = {
    "large_compiled_gate": "execution: a compiled function that is called without its module",
    "large_whitening_forward_hook": "execution: a module's own hook runs when it is already left",
}

SOURCE = """
def loss_fn(model, x):
    h = x.sqrt()  # CULPRIT
    return (h / x).log()  # CULPRIT2
"""
SQRT = {
    "id": "made_by_hand",
    "phase": "backward",
    "op": "aten::sqrt",
    "node": "SqrtBackward0",
    "marker": "CULPRIT",
    "cause": "infinite_derivative_at_boundary",
    "decoys": ["aten::mul"],
}
RIGHT = Named("backward", "aten::sqrt", "SqrtBackward0", 3, "infinite_derivative_at_boundary")


def scores(folder, file):
    """What the benchmark writes about a folder, by id."""
    words = [sys.executable, str(BENCHMARK), "--cases", str(folder), "--json", str(file)]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    document = json.loads(file.read_text(encoding="utf-8"))
    return {row["id"]: row for row in document["cases"]}, document["totals"], ran.stdout


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """The rows of all cases of the zoo."""
    return scores(CASES, tmp_path_factory.mktemp("zoo") / "scores.json")[0]


def faults_of(row):
    """In which respects a row is wrong."""
    asked = ("hit", "cause_hit", "all_culprits", "execution")
    wrong = [name for name in asked if row[name] is False]
    return [*wrong, *(name for name in ("alarm", "error") if row[name])]


@pytest.mark.parametrize("name", [file.stem for file in accuracy.cases_in(CASES)])
def test_zoo(zoo, name):
    """Phase, op, line and cause are right, and healthy programs are left alone."""
    row = zoo[name]
    wrong = faults_of(row)
    if name in KNOWN_MISSES:
        assert wrong, f"{name} is right now: take it out of KNOWN_MISSES"
    else:
        assert not wrong, f"wrong: {wrong}\ntrue: {row['true']}\nsaid: {accuracy.sentence(row)}"


def test_known_misses_exist():
    """A case that went takes its reason along."""
    assert set(KNOWN_MISSES) <= {file.stem for file in accuracy.cases_in(CASES)}


def judged(*named, source=SOURCE, **changed):
    """The verdict on culprits that were named by hand."""
    return accuracy.judge({**SQRT, **changed}, Answer(named), source)


def but(named, **changed):
    """A culprit with some fields changed."""
    return accuracy.dataclasses.replace(named, **changed)


def test_right_answer():
    """Everything is right."""
    verdict = judged(RIGHT)
    assert verdict.main == accuracy.Match(True, True, False, True, True, None)
    assert verdict.main.is_hit
    assert not verdict.alarm
    assert verdict.all_culprits is None


@pytest.mark.parametrize(
    ("changed", "is_hit"),
    [
        ({"phase": "forward"}, False),
        ({"line": 4}, False),
        ({"line": None}, False),
        ({"op": "aten::mul", "node": "MulBackward0"}, False),
        ({"op": None}, True),
        ({"node": None}, True),
        ({"op": "aten::mul"}, True),
        ({"node": "SqrtBackward"}, True),
        ({"cause": "pole"}, True),
    ],
    ids=str,
)
def test_what_makes_a_hit(changed, is_hit):
    """Phase, line, and either op or node; the cause is counted apart."""
    match = judged(but(RIGHT, **changed)).main
    assert match.is_hit == is_hit
    assert match.cause == (changed.get("cause") is None)


def test_nothing_named_is_a_miss():
    """Silence about a fault is wrong in every respect, the execution among them."""
    match = judged(occurrence=2).main
    assert match == accuracy.Match(False, False, False, False, False, False)
    assert not judged(phase="optimizer", node=None).main.line
    assert not judged(phase="data", op="input").main.line


def test_only_the_first_named_counts():
    """A tool that names everything is not right for that."""
    assert not judged(but(RIGHT, op="aten::mul", node=None), RIGHT).main.is_hit


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("aten::_softmax", "aten.softmax.int"),
        ("aten::native_layer_norm", "layer_norm"),
        ("aten::nll_loss_forward", "aten::nll_loss"),
        ("aten::add_.Tensor", "aten::add"),
        ("custom:Softplus", "Softplus"),
        ("aten::_foreach_add_", "_foreach_add"),
    ],
)
def test_same_op(one, other):
    """Names are compared without namespace, overload, underscores and the kernel's variants."""
    assert accuracy.plain_op(one) == accuracy.plain_op(other)


def test_also():
    """Other answers that the case accepts are hits, but not strict ones."""
    match = judged(but(RIGHT, op="aten::pow", node=None), also=["aten::pow"]).main
    assert match.is_hit
    assert not match.is_strict
    elsewhere = but(RIGHT, op="aten::pow", node=None, line=4)
    assert not judged(elsewhere, also=["aten::pow"]).main.is_hit


def test_also_a_tensor_or_the_optimizer():
    """What the batch held, or the update, may be accepted too."""
    inf = Named("data", "input", where="batch[1]")
    assert judged(inf, also=["batch[1]"]).main.is_hit
    assert not judged(inf, also=["batch[0]"]).main.is_hit
    assert judged(Named("optimizer", "aten::add_"), also=["optimizer"]).main.is_hit


def test_decoy():
    """Naming what only received the value is the worst miss."""
    assert judged(but(RIGHT, op="aten::mul_", node=None)).decoy
    assert not judged(RIGHT).decoy


def test_false_alarm():
    """On a healthy program nothing is to be named."""
    healthy = {"phase": "none", "op": None, "node": None}
    assert judged(RIGHT, **healthy).alarm
    assert judged(**healthy) == accuracy.Verdict(None)


@pytest.mark.parametrize(
    ("where", "is_hit"), [("param:a.weight", True), (None, True), ("param:b.weight", False)]
)
def test_data(where, is_hit):
    """A value that was there before the step has a place, and no line."""
    truth = {"phase": "data", "op": "parameter", "node": None, "where": "param:a.weight"}
    assert judged(Named("data", "parameter", where=where), **truth).main.is_hit == is_hit
    assert not judged(Named("data", "buffer", where=where), **truth).main.is_hit


@pytest.mark.parametrize(
    ("body", "line", "is_hit"),
    [
        ("def train_step():\n    opt.step()  # CULPRIT\n", 2, True),
        ("def train_step():\n    opt.step()  # CULPRIT\n", None, False),
        ("def build():\n    pass\n", None, True),
        ("def build():\n    pass\n", 1, False),
    ],
)
def test_optimizer_line(body, line, is_hit):
    """The update has a line if the case calls it, and none if the tool does."""
    truth = {"phase": "optimizer", "op": "aten::addcdiv_", "node": None}
    named = Named("optimizer", "aten::addcdiv_", line=line)
    assert judged(named, source=body, **truth).main.is_hit == is_hit


def test_all_culprits():
    """Each of two independent faults is to be named; the first stays the main one."""
    both = [{"op": "aten::sqrt"}, {"op": "aten::log", "marker": "CULPRIT2"}]
    log = Named("backward", "aten::log", line=4)
    assert judged(RIGHT, log, culprits=both).all_culprits is True
    alone = judged(RIGHT, culprits=both)
    assert alone.all_culprits is False
    assert alone.main.is_hit
    assert not judged(log, RIGHT, culprits=both).main.is_hit


@pytest.mark.parametrize(
    ("occurrence", "module", "is_right"), [(2, "cell", True), (1, "cell", False), (2, "", False)]
)
def test_execution(occurrence, module, is_right):
    """Which of several executions of the line, where the case says so."""
    named = but(RIGHT, occurrence=occurrence, module=module)
    match = judged(named, occurrence=2, module="cell").main
    assert match.execution is is_right
    assert match.is_hit


def test_mark_is_needed():
    """A fault whose line is not marked cannot be judged."""
    with pytest.raises(ValueError, match=r"no line of the case ends in '# CULPRIT'"):
        judged(RIGHT, source="x = 1\n")


def test_bad_files_are_rows(tmp_path):
    """A folder may hold anything: what is wrong with a file stands in its row."""
    good = """import torch
CASE = dict(id="good", phase="backward", op="aten::sqrt", node="SqrtBackward0", marker="CULPRIT")
def build():
    model = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    return model, (torch.ones(2, 1),), lambda m, x: m(x).abs().sqrt().sum()  # CULPRIT
"""
    (tmp_path / "good.py").write_text(good)
    (tmp_path / "unmarked.py").write_text(good.replace("# CULPRIT", "").replace("good", "unmarked"))
    (tmp_path / "broken.py").write_text("def build(:\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "leaves.py").write_text("import os\nos._exit(7)\n")
    (tmp_path / "half.py").write_text(
        "CASE = dict(id='half')\ndef build():\n    raise SystemExit\n"
    )
    (tmp_path / "_support.py").write_text("raise SystemExit\n")
    rows, totals, printed = scores(tmp_path, tmp_path / "scores.json")
    assert set(rows) == {"good", "unmarked", "broken", "empty", "leaves", "half"}
    assert rows["good"]["error"] is None
    assert rows["good"]["hit"]
    assert rows["unmarked"]["error"] == "ValueError: no line of the case ends in '# CULPRIT'"
    assert rows["broken"]["error"].startswith("SyntaxError")
    assert rows["empty"]["error"] == "TypeError: empty.py has no CASE"
    assert rows["leaves"]["error"] == "its process died with exit code 7"
    assert rows["half"]["error"] == "ValueError: the CASE of half.py lacks phase, op"
    assert (totals["cases"], totals["faults"], totals["controls"]) == (6, 1, 0)
    assert (totals["hits"], totals["errors"]) == (1, 5)
    assert "its process died with exit code 7" in printed
