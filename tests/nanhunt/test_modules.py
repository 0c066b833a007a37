"""What each module did, and every event as a row of a frame."""

import io
import sys

import pandas as pd
import pytest
import torch
from rich.console import Console
from torch import nn

from nanhunt.cli import main
from nanhunt.errors import UsageError
from nanhunt.hunting import Plan, investigate
from nanhunt.report import renderer
from nanhunt.report.events import check_format, save, tabulate


class Net(nn.Module):
    """Two layers with a square root between them, which is 0 for a zero input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(2, 3, bias=False), nn.Linear(3, 1)

    def forward(self, x):
        return self.second(self.first(x).abs().sqrt())


def loss(model, x):
    return model(x).square().mean()


@pytest.fixture(scope="module")
def failing():
    """A report and a trace in which the second of two samples has a root at 0."""
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    return investigate((Net(), (x,), loss), Plan(precisions=("native", "amp-bf16")))


@pytest.fixture(scope="module")
def healthy():
    return investigate((Net(), (torch.ones(2, 2),), loss), Plan(precisions=("native",)))


def by_name(report):
    return {row.module: row for row in report.modules}


def test_nothing_finite_has_no_size():
    """Where every element of an output is non-finite there is no largest one of the finite ones."""
    report = investigate((Net(), (torch.full((2, 2), torch.nan),), loss), Plan(precisions=()))[0]
    assert report.modules
    assert {(row.largest, row.rms) for row in report.modules} == {(None, None)}


def test_outputs_are_measured(healthy):
    """Largest magnitude and root mean square are those of the module's own output."""
    model = Net()
    out = model.first(torch.ones(2, 2))
    row = by_name(healthy[0])["first"]
    assert row.largest == pytest.approx(out.abs().max().item())
    assert row.rms == pytest.approx(out.square().mean().sqrt().item())
    assert row.nonfinite_out == 0


def test_arriving_gradients_are_measured(healthy):
    """The norm is that of the gradient of the loss with respect to the module's output."""
    model, x = Net(), torch.ones(2, 2)
    out = model(x)
    (expected,) = torch.autograd.grad(out.square().mean(), out)
    row = by_name(healthy[0])["second"]
    assert row.gradient == pytest.approx(expected.norm().item())
    assert by_name(healthy[0])["(model)"].gradient == pytest.approx(expected.norm().item())


def test_poison_shows_where_it_arrives(failing):
    """The gradient is finite above the root and not below it."""
    rows = by_name(failing[0])
    assert (rows["second"].nonfinite_gradient, rows["first"].nonfinite_gradient) == (0, 3)
    assert rows["first"].gradient != rows["first"].gradient
    assert rows["first"].nonfinite_out == 0


def test_ops_are_counted_by_dtype(failing):
    """The layer's product is one op forward, and its own in the backward."""
    rows = by_name(failing[0])
    assert dict(rows["first"].forward)["float32"] >= 1
    assert dict(rows["first"].backward)["float32"] >= 1


def test_variants_tell_their_modules_too(failing):
    """Under autocast the same modules run in half precision; the native ones are the report's."""
    native, amp = failing[0].runs
    assert native.modules == ()
    assert "bfloat16" in dict({row.module: row for row in amp.modules}["first"].forward)


@pytest.mark.parametrize("form", ["modules", "terminal"])
def test_both_forms_show_the_modules(failing, form):
    """The form `modules` has all rows, the terminal report those around the culprit."""
    console = Console(width=100, file=io.StringIO())
    console.print(renderer(form)(failing[0]))
    text = console.file.getvalue().split("Modules", 1)[1]
    assert all(name in text for name in ("(model)", "first", "second"))


def test_watching_leaves_no_hook():
    """Hooks on outputs are gone when the replay is over, and results are the same bits."""
    model = Net()
    investigate((model, (torch.ones(2, 2),), loss), Plan(precisions=("native",)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_frame_has_one_row_per_event(failing):
    """Phase, op, line, node, counts and terms of each event stand in columns."""
    _, trace = failing
    frame = tabulate(trace)
    assert len(frame) == len(trace.events)
    root = frame[(frame.op == "aten::sqrt") & (frame.phase == "forward")].iloc[0]
    assert root.function == "Net.forward"
    assert root.file.endswith("test_modules.py")
    born = frame[frame.birth > 0].iloc[0]
    assert (born.phase, born.node, born.birth) == ("backward", "SqrtBackward0", 3)


def test_frame_is_saved_as_its_name_says(failing, tmp_path):
    """CSV by itself, Parquet where pyarrow is installed, nothing else."""
    _, trace = failing
    save(trace, tmp_path / "events.csv")
    assert len(pd.read_csv(tmp_path / "events.csv")) == len(trace.events)
    with pytest.raises(UsageError, match=r"is to end in \.csv or \.parquet"):
        check_format(tmp_path / "events.txt")


def test_parquet(failing, tmp_path):
    """The same rows come back from Parquet."""
    pytest.importorskip("pyarrow")
    save(failing[1], tmp_path / "events.parquet")
    assert len(pd.read_parquet(tmp_path / "events.parquet")) == len(failing[1].events)


def test_parquet_without_its_writer(monkeypatch, tmp_path):
    """Without pyarrow it is refused before the work, with what would do."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"writing Parquet needs pyarrow; use \.csv"):
        check_format(tmp_path / "events.parquet")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("no/events.csv", "there is no folder"), ("events.xml", "is to end in .csv or .parquet")],
)
def test_refused_before_the_work(name, sentence, tmp_path, monkeypatch, capsys):
    """The command line refuses a file that it could not write, in one sentence."""
    monkeypatch.setattr(sys, "argv", ["nanhunt", "replay", "--events", str(tmp_path / name)])
    with pytest.raises(SystemExit) as left:
        main()
    out, err = capsys.readouterr()
    assert (left.value.code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1
