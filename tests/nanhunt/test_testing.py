"""`assert_finite_backward`, and the pytest plugin as another project meets it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nanhunt.errors import SubjectError, UsageError
from nanhunt.records import Report
from nanhunt.testing import assert_finite_backward

ROOT = Path(__file__).parents[2]


def model():
    """A linear layer whose bias is frozen."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    return layer


def healthy(net, x):
    """Mean square."""
    return net(x).square().mean()


def rooted(net, x):
    """The root of 0: finite, and its gradient is not."""
    return (net(x) * 0).sum().sqrt()


def large(net, x):
    """Fits FP32 and no FP16."""
    return (net(x) * 1e4).square().mean()


def test_healthy_step_passes():
    """It passes in every variant, and leaves no gradient behind."""
    net, x = model(), torch.ones(4, 3)
    assert_finite_backward(net, healthy, (x,), variants=("native", "fp64", "amp-bf16"))
    assert net.weight.grad is None


def test_failure_tells_the_short_report():
    """What is non-finite, where and why; the report comes along."""
    with pytest.raises(AssertionError) as caught:
        assert_finite_backward(model(), rooted, torch.ones(4, 3))
    text = str(caught.value)
    assert text.startswith("the loss is finite (0); 1 of 1 gradients are not\n  where     sqrt")
    assert "test_testing.py" in text
    assert isinstance(caught.value.report, Report)


def test_failure_in_one_variant_only():
    """The variant, what is non-finite there, and the line."""
    with pytest.raises(
        AssertionError, match=r"^amp-fp16: the loss is inf: aten::\w+ at .*\.py:\d+"
    ):
        assert_finite_backward(
            model(), lambda net, x: net(x).mul(1e4).sum(), torch.full((4, 3), 9.0),
            variants=["amp-fp16"],
        )  # fmt: skip


def test_optimizer():
    """With an optimizer the parameters after a step count too."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=float("inf"))
    with pytest.raises(AssertionError, match="after the optimizer step 1 of 1 parameters are not"):
        assert_finite_backward(net, healthy, torch.ones(4, 3), optimizer=optimizer)
    assert torch.isfinite(net.weight).all()


def test_wrong_words():
    """What is no variant, and a step that cannot run, are no assertions."""
    with pytest.raises(UsageError, match=r"^no precision is called 'fp63'; did you mean fp64"):
        assert_finite_backward(model(), healthy, torch.ones(4, 3), variants=["fp63"])
    with pytest.raises(UsageError, match=r"^variants are names, as in \['fp64'\]; got 'fp64'"):
        assert_finite_backward(model(), healthy, torch.ones(4, 3), variants="fp64")
    with pytest.raises(SubjectError, match=r"^the step raised RuntimeError"):
        assert_finite_backward(model(), healthy, torch.ones(4, 7))


# --- the plugin ----------------------------------------------------------------------------------

PROGRAM = """
import pytest
import torch
from torch import nn


def step(loss):
    layer = nn.Linear(3, 1)
    loss(layer(torch.ones(2, 3))).backward()
    return layer.weight.grad


def sick(y):
    return (y * 0).sum().sqrt()


def test_healthy():
    assert step(lambda y: y.square().mean()) is not None


def test_sick():
    step(sick)


def test_sick_and_wrong():
    assert torch.isfinite(step(sick)).all()


def test_without_torch():
    assert True


def test_skipped():
    pytest.skip("no")


@pytest.mark.finite_gradients
def test_marked():
    step(sick)


@pytest.mark.finite_gradients(allow=["sqrt"])
def test_allowed():
    step(sick)


@pytest.mark.finite_gradients(False)
def test_left_alone():
    step(sick)
"""


def run_pytest(folder, *options):
    """Run pytest on the program in a process of its own, with the plugin and no other."""
    (folder / "test_program.py").write_text(PROGRAM, encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "COLUMNS": "120",
    }
    words = ["-p", "nanhunt.adapters.pytest_plugin", "--strict-markers", "-q", "-rA", *options]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "test_program.py"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return ran.stdout + ran.stderr


def outcomes(text):
    """Name of each test and its outcome."""
    lines = (line.split() for line in text.splitlines())
    found = {w[1].rpartition("::")[2]: w[0] for w in lines if len(w) > 1 and "::test_" in w[1]}
    return {name: word for name, word in found.items() if word in ("PASSED", "FAILED")}


QUIET = {"test_healthy", "test_without_torch", "test_allowed", "test_left_alone"}
SICK = {"test_sick", "test_sick_and_wrong", "test_marked"}


def check_watched(text):
    """Every sick test failed and tells the report; the others passed."""
    found = outcomes(text)
    assert {name for name, word in found.items() if word == "FAILED"} == SICK
    assert {name for name, word in found.items() if word == "PASSED"} == QUIET
    assert text.count("Captured nanhunt call") >= 1
    assert text.count("nanhunt: the loss is finite (0); 2 of 2 gradients are not") >= 2
    assert "sqrt, in its backward" in text
    line = PROGRAM.splitlines().index("    return (y * 0).sum().sqrt()") + 1
    assert f"test_program.py:{line} in sick" in text


def test_asked_for(tmp_path):
    """`--nanhunt` fails every test that makes a non-finite gradient, and says why."""
    check_watched(run_pytest(tmp_path, "--nanhunt"))


def test_asleep(tmp_path):
    """Without the option only the marked test is watched."""
    found = outcomes(run_pytest(tmp_path))
    assert {n for n, w in found.items() if w == "FAILED"} == {"test_marked", "test_sick_and_wrong"}


def test_with_xdist(tmp_path):
    """The reports come from the workers too."""
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    check_watched(run_pytest(tmp_path, "--nanhunt", "-p", "xdist.plugin", "-n", "2"))


def test_imports_nothing_heavy():
    """A run that does not use it does not pay for torch, rich or typer."""
    code = (
        "import sys, pytest, nanhunt.adapters.pytest_plugin; "
        "print([m for m in ('torch', 'rich', 'typer', 'nanhunt.gate') if m in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.stdout == "[]\n"
