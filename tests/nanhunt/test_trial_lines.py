"""Trials on paper: the user's line with a change written into it, and what the report says."""

import io
import sys
from dataclasses import replace

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from torch.nn import functional as F  # noqa: N812 - as users write it

from nanhunt.records import Trial
from nanhunt.report import renderer
from nanhunt.trials.calls import CallMode
from nanhunt.trials.edits import Edit
from nanhunt.trials.lines import rewritten

GUARD = Edit("safe_argument", "x", "{x}.clamp_min(1e-8)")
DIVISOR = Edit("safe_denominator", "y", "torch.where({y} == 0, 1.0, {y})")
SUM = Edit("safe_argument", "x", "{x} + 1e-8")
EITHER = Edit("skip_empty", "call", "{call} if {x}.numel() else {x}.sum()")
EPS = Edit("eps_for_dtype", "keyword", "eps=1e-08")
x = y = torch.tensor([1.0, 2.0])
größe = x  # noqa: PLC2401 - columns are counted in bytes


class Looking(CallMode):
    """The first call of a name."""

    def __init__(self, name):
        super().__init__()
        self.name, self.site = name, None

    def meet(self, call):
        if call.site.name == self.name and self.site is None:
            self.site = call.site
        return self.proceed(call)


def written(name, edit, function):
    """The line after the edit, from the first `: ` on."""
    looking = Looking(name)
    with looking:
        function()
    found = rewritten(looking.site, edit)
    if found is None:
        return None
    before, after = found
    assert before != after
    return after.partition("lambda: ")[2].rstrip("),")


# fmt: off
LINES = [
    ("sqrt", GUARD, lambda: x.sqrt() + 0, "x.clamp_min(1e-8).sqrt() + 0"),
    ("sqrt", GUARD, lambda: torch.sqrt(x), "torch.sqrt(x.clamp_min(1e-8"),
    ("sqrt", GUARD, lambda: torch.sqrt(x + y), "torch.sqrt((x + y).clamp_min(1e-8"),
    ("log", GUARD, lambda: größe.log() + größe, "größe.clamp_min(1e-8).log() + größe"),
    ("norm", SUM, lambda: (x + y).norm() + 0, "((x + y) + 1e-8).norm() + 0"),
    ("rdiv", DIVISOR, lambda: 1 / y + x, "1 / torch.where(y == 0, 1.0, y) + x"),
    ("div", DIVISOR, lambda: x / y, "x / torch.where(y == 0, 1.0, y"),
    ("div", DIVISOR, lambda: x / (y + 1), "x / torch.where((y + 1) == 0, 1.0, (y + 1"),
    ("mul", SUM, lambda: x * y, "(x + 1e-8) * y"),
    ("mean", EITHER, lambda: 2 * x.mean(), "2 * (x.mean() if x.numel() else x.sum("),
    ("normalize", EPS, lambda: F.normalize(x, dim=-1), "F.normalize(x, dim=-1, eps=1e-08"),
    ("normalize", EPS, lambda: F.normalize(x, dim=-1, eps=0.0), "F.normalize(x, dim=-1, eps=1e-08"),
    ("clamp_min", GUARD, lambda: F.normalize(x, dim=-1), None),
]
# fmt: on


def label(row):
    return f"{row[0]}-{row[1].target}"


@pytest.mark.parametrize("row", LINES, ids=label)
def test_line(row):
    """The changed operand stands where the old one stood, and the rest is as the user wrote it."""
    name, edit, function, expected = row
    after = written(name, edit, function)
    if expected is None:
        assert after is None
    else:
        assert after.startswith(expected)


def test_several_lines():
    """A call that does not stand on one line is not written."""

    def spread():
        return torch.sqrt(
            x + y,
        )

    assert written("sqrt", GUARD, spread) is None


def test_comment_and_place():
    """What stands around the call stays, a comment as well."""
    looking = Looking("log")
    with looking:
        _ = [x.sum(), x.log()]  # the odds
    before, after = rewritten(looking.site, GUARD)
    assert before == "_ = [x.sum(), x.log()]  # the odds"
    assert after == "_ = [x.sum(), x.clamp_min(1e-8).log()]  # the odds"


def test_no_source():
    """Code without a file cannot be written."""
    names = {"x": x}
    exec(compile("def f():\n    return x.log()", "<none>", "exec"), names)  # noqa: S102 - a test
    assert written("log", GUARD, names["f"]) is None


@pytest.mark.parametrize("text", ["2 * x.log()", "x.exp() * 3 + x.sqrt().log()"])
def test_the_line_runs_and_is_what_was_tried(text, tmp_path, monkeypatch):
    """A written line has the value that the trial had."""
    (tmp_path / "written_one.py").write_text(f"def f(x):\n    return {text}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "written_one", raising=False)
    import written_one

    edit = Edit("any", "x", "{x} + 0.5")
    looking = Looking("log")
    with looking:
        written_one.f(x)
    _, after = rewritten(looking.site, edit)
    value = eval(after.removeprefix("return "), {"x": x})  # noqa: S307 - a test
    argument = x if text.startswith("2") else x.sqrt()
    changed = torch.log(argument + 0.5)
    expected = 2 * changed if text.startswith("2") else x.exp() * 3 + changed
    torch.testing.assert_close(value, expected)


# -- the report ------------------------------------------------------------------------------------

NEUTRAL = Trial("neutralise", "repaired", finite=True)
CURE = Trial(
    "safe_argument",
    "log: x → x.clamp_min(1e-08)",
    finite=True,
    sites=("model.py:3",),
    times=1,
    before="loss = x.log().mean()",
    after="loss = x.clamp_min(1e-08).log().mean()",
    loss=1.0,
    loss_change=0.0,
    gradient=2.0,
    gradient_error=1e-6,
    reference="fp64",
)
FAILED = Trial("more_loading", "eigh: x → loaded(x, 1)", sites=("model.py:3",))


def shown(report, trials, width=100):
    console = Console(file=io.StringIO(), width=width, legacy_windows=False)
    console.print(renderer("terminal")(replace(report, trials=trials)))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize(
    ("trials", "words"),
    [
        ((NEUTRAL, CURE), ["sole cause", "yes: repaired", "proven: finite", "agrees with fp64"]),
        ((replace(NEUTRAL, finite=False), CURE), ["no: repaired at birth"]),
        ((NEUTRAL, FAILED, CURE), ["refuted: more_loading", "+ loss = x.clamp_min(1e-08)"]),
        ((NEUTRAL, replace(CURE, loss_change=0.5)), ["not proven: finite", "changed by 50 %"]),
        ((NEUTRAL, replace(CURE, loss_change=1.4, loss=1.4e-6)), ["loss changed to 1.4e-06"]),
        ((NEUTRAL, replace(CURE, loss_change=30.0, loss=152.3)), ["loss changed to 152.3"]),
        ((NEUTRAL, replace(CURE, gradient_error=0.5)), ["not proven", "differs from fp64: 0.5"]),
        ((NEUTRAL, FAILED), ["none of 1 changes made it finite: more_loading"]),
        ((NEUTRAL, replace(CURE, before=None, after=None)), ["log: x → x.clamp_min", "model.py:3"]),
        (
            (NEUTRAL, replace(CURE, gradient_error=None, vanished=2, revived=0)),
            ["not proven", "nothing is learnt there"],
        ),
        (
            (NEUTRAL, replace(CURE, gradient_error=None, vanished=2, revived=1)),
            ["2 parameters get a gradient of exactly 0"],
        ),
        ((NEUTRAL, replace(CURE, recipe="saturate", reference="")), ["cannot be compared"]),
    ],
)
def test_report(incident_report, trials, words, width):
    """The fix, whether it is proven, and its line stand in the verdict and fit the width."""
    text = shown(incident_report, trials, width)
    flat = " ".join(text.replace("│", " ").split())
    for word in words:
        assert word in flat
    assert max(cell_len(line) for line in text.splitlines()) <= width


def test_report_without_trials(incident_report):
    """Nothing tried, nothing claimed."""
    text = shown(incident_report, ())
    assert "sole cause" not in text
    assert "proven" not in text
    assert "Trials" not in text
