"""The op-level reproduction: a script shows the culprit with torch alone, or says it cannot."""

import contextlib
import io
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nanhunt import store
from nanhunt.errors import UsageError
from nanhunt.hunting import Order, Plan, investigate
from nanhunt.hunting.reproduction import is_same
from nanhunt.recorder import Captured
from nanhunt.recorder.captured import copied, unfit
from nanhunt.recorder.schema import op_info
from nanhunt.records import Finding, Report, Reproduction
from nanhunt.report.repro import sentence
from nanhunt.repro import check_folder, folder
from nanhunt.repro.reduction import reduced
from nanhunt.repro.scene import Look, Scene
from nanhunt.repro.script import OPERANDS, SCRIPT, pages_of
from nanhunt.repro.spelling import call_of, literal
from nanhunt.subject import Subject

ATEN = torch.ops.aten
INF, NAN = float("inf"), float("nan")
IN_A_PROCESS = folder._ran
FIRST = Look(0)


def ran_here(place):
    """Run a script in this process: whether it reproduces, and what it printed before the word."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as left:
        runpy.run_path(str(place / SCRIPT))
    shown, word = printed.getvalue().splitlines()[-2:]
    assert word == {0: "reproduced", 1: "did not reproduce"}[left.value.code]
    return left.value.code == 0, shown


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Starting Python and importing torch takes seconds; two tests do it all the same."""
    monkeypatch.setattr(folder, "_ran", ran_here)


@pytest.fixture
def shown(tmp_path):
    """Hunt with a script, and return the report and what lies in its folder."""

    def hunt(loss, *batch, model=None, steps=1, **more):
        made = {name: more[name](model) if name == "optimizer" else more[name] for name in more}
        subject = Subject(model or Scale(), lambda _: batch, loss, **made)
        out = tmp_path / "out"
        plan = Plan(precisions=(), steps=steps, repro=Order(out))
        report, _ = investigate(subject, plan)
        written = report.repro is not None and bool(report.repro.folder)
        assert out.exists() == written
        text = (out / SCRIPT).read_text(encoding="utf-8") if written else ""
        tensors = load_file(out / OPERANDS) if written else {}
        return report, text, tensors

    return hunt


class Scale(nn.Module):
    """Multiplies by a weight."""

    def __init__(self, value=1.0, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value, dtype=dtype))

    def forward(self, x):
        return self.weight * x


# -- phases ----------------------------------------------------------------------------------------


def test_forward_in_a_clean_process(shown, monkeypatch):
    """The op with its real operands, cut to the offending element, run without anything of ours."""
    monkeypatch.setattr(folder, "_ran", IN_A_PROCESS)
    x = torch.rand(8, 5) + 0.5
    x[3, 2] = 0.0
    report, text, tensors = shown(lambda model, x: model(x).log().mean(), x)
    repro = report.repro
    assert repro.works, repro.note
    assert repro.shown == "the result: 1 of 1 elements NaN or infinite, first [-inf]"
    assert repro.operands == (("self", (8, 5), (1, 1)),)
    assert (repro.is_backward, repro.bytes_before, repro.note) == (False, 160, "")
    assert tensors["self"].tolist() == [[0.0]]
    assert 'y = torch.log(t["self"])' in text
    assert "test_repro.py" in text.split('"""')[1]
    assert "nanhunt" not in text.split('"""')[2]
    assert repro.bytes == sum(f.stat().st_size for f in Path(repro.folder).iterdir())


def test_backward_with_the_real_gradient(shown):
    """The forward op is called, and the gradient that came to it is fed back."""
    x = torch.tensor([[4.0, 0.0], [1.0, 9.0]])
    report, text, tensors = shown(lambda model, x: (model(x).sqrt() * 3.0).sum(), x)
    assert report.repro.works
    assert report.repro.is_backward
    assert report.repro.shown == "gradient of self: 1 of 1 elements NaN or infinite, first [inf]"
    assert tensors["gradient"].tolist() == [[3.0]]
    assert 'grads = torch.autograd.grad(y, t["self"], t["gradient"])' in text


def test_complex_decomposition(shown):
    """Complex doubles are kept as pairs, both gradients come along, and ties stay ties."""
    a = torch.eye(3, dtype=torch.complex128).repeat(4, 1, 1)
    a[:, 0, 0] = torch.tensor([1.0, 1.0, 5.0, 1.0])

    def loss(model, a):
        values, vectors = torch.linalg.eigh(model.weight * a)
        return (vectors * torch.arange(9).reshape(3, 3)).abs().sum() + values.sum()

    report, text, tensors = shown(loss, a, model=Scale(1.0, torch.float64))
    assert report.repro.works, report.repro.note
    assert tensors["A"].shape == (1, 3, 3, 2)
    assert tensors["A"].dtype == torch.float64
    assert 'torch.view_as_complex(t["A"])' in text
    assert 'y = torch.linalg.eigh(t["A"])' in text
    assert ("A", (4, 3, 3), (1, 3, 3)) in report.repro.operands


def test_optimizer_lists(shown):
    """A list of tensors is cut to the guilty entry; what the op writes to is as it was before."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Parameter(torch.ones(3))
            self.idle = nn.Parameter(torch.ones(5))

        def forward(self, x):
            return self.used * x + 0 * self.idle.sum()

    report, _, tensors = shown(
        lambda model, x: model(x).sum(),
        torch.rand(3),
        model=Two(),
        optimizer=lambda model: torch.optim.Adam(model.parameters(), eps=0.0, foreach=True),
    )
    assert report.culprits[0].phase == "optimizer"
    assert report.repro.works, report.repro.note
    assert report.repro.note == "the lists are cut to one of their 2 entries"
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert {before for _, before, _ in report.repro.operands} == {(5,)}


def test_data(shown):
    """What came with the batch was made by no op: nothing is written."""
    report, _, _ = shown(lambda model, x: model(x).sum(), torch.tensor([1.0, NAN]))
    assert report.repro == Reproduction(
        "", works=False, note="no op made it: batch[0] was non-finite before the step"
    )
    assert sentence(report).startswith("none: no op made it")


class Root(torch.autograd.Function):
    """A root whose backward divides by it."""

    @staticmethod
    def forward(ctx, x):
        y = x.sqrt()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return gradient / (2 * y)


def test_custom_function(shown):
    """The very op of the backward that the user wrote."""
    x = torch.tensor([4.0, 0.0])
    report, text, tensors = shown(lambda model, x: Root.apply(model(x)).sum(), x)
    assert report.culprits[0].op == "custom:Root"
    assert report.repro.works
    assert not report.repro.is_backward
    assert (tensors["self"].tolist(), tensors["other"].tolist()) == ([1.0], [0.0])
    assert "RootBackward" in text


def test_hook(shown):
    """An op in a gradient hook."""

    def loss(model, x):
        y = model(x)
        y.register_hook(lambda g: g / g.sum())
        return (y * torch.tensor([1.0, -1.0])).sum()

    report, _, _ = shown(loss, torch.ones(2))
    assert report.repro.works
    assert not report.repro.is_backward


def test_engine_addition(shown):
    """The sum of two gradients is no op of anybody's formula."""

    def loss(model, x):
        y = model(x)
        return (y * 4e4).float().sum() + (y * 4.5e4).float().sum()

    report, _, tensors = shown(
        loss, torch.ones(2, dtype=torch.float16), model=Scale(1.0, torch.float16)
    )
    assert report.culprits[0].phase == "backward"
    assert report.repro.works, report.repro.note
    assert {t.dtype for t in tensors.values()} == {torch.float16}


# -- whose gradient it was -------------------------------------------------------------------------


def test_checkpointed(shown):
    """The forward is recomputed; the node that runs is that of the first one."""

    def loss(model, x):
        inner = torch.utils.checkpoint.checkpoint(
            lambda v: (v - 1).sqrt() * 2, model(x), use_reentrant=False
        )
        return inner.sum()

    report, _, tensors = shown(loss, torch.tensor([1.0, 2.0]))
    assert report.repro.works
    assert report.repro.is_backward
    assert tensors["gradient"].tolist() == [2.0]


def test_gradient_of_a_gradient(shown):
    """A norm of a gradient: its node is made in the first backward and runs in the second."""

    def loss(model, x):
        y = model(x)
        (slope,) = torch.autograd.grad((y * 0).sum(), y, create_graph=True)
        return (slope * model.weight).pow(2).sum().sqrt() + y.sum()

    report, _, _ = shown(loss, torch.ones(3))
    assert report.culprits[0].node == "SqrtBackward0"
    assert report.repro.works
    assert report.repro.is_backward


def test_node_that_runs_twice(shown):
    """A graph that is kept: the gradient of the run that failed, not of another."""

    def train_step(model, batch, loss_fn, optimizer, scaler, step):
        model.zero_grad()
        root = model(batch[0]).sqrt()
        loss = root.sum()
        yield "loss", loss
        (root * torch.tensor([1.0, 0.5])).sum().backward(retain_graph=True)
        (root * torch.tensor([7.0, 8.0])).sum().backward()
        yield "grads", loss

    report, _, tensors = shown(
        lambda model, x: model(x).sum(), torch.tensor([1.0, 0.0]), train_step=train_step
    )
    assert report.repro.works
    assert tensors["gradient"].tolist() == [0.5]


def test_in_place(shown):
    """What an op overwrites is as it was before; above autograd it works on a copy."""
    report, text, tensors = shown(
        lambda model, x: model(x).add(0.0).sqrt_().sum(), torch.tensor([1.0, 0.0])
    )
    assert report.repro.works, report.repro.note
    assert report.repro.is_backward
    assert tensors["self"].tolist() == [0.0]
    assert 'y = t["self"].clone().sqrt_()' in text


def test_in_place_on_a_view(shown):
    """Its node is another one than the op's: the op of the formula is called, and that is told."""

    def loss(model, x):
        y = model(x).clone()
        y[:2].sqrt_()
        return y.sum()

    report, _, _ = shown(loss, torch.tensor([1.0, 0.0, 4.0]))
    assert report.repro.works
    assert not report.repro.is_backward
    assert "the op of the formula, div, is called instead" in report.repro.note
    assert report.repro.note in sentence(report)


def test_vmapped(shown):
    """Below a transform the operands are those of the whole batch."""

    def loss(model, x):
        return torch.func.vmap(lambda row: row.pow(2).sum().sqrt())(model(x)).sum()

    report, _, _ = shown(loss, torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    assert report.repro.works
    assert report.repro.is_backward


def test_step_before(shown):
    """A value that an earlier step left in a buffer: that step is replayed."""

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))
            self.register_buffer("seen", torch.ones(()))

        def forward(self, x):
            y = self.weight * x * self.seen.clone()
            self.seen.copy_((x.min() - 0.2).log())
            return y

    def train_step(model, batch, loss_fn, optimizer, scaler, step):
        model.zero_grad()
        loss = loss_fn(model, *batch) + (1.0 if step else 0.0)
        yield "loss", loss
        loss.backward()
        yield "grads", loss
        optimizer.step()
        yield "step", loss

    model = Norm()
    report, _, tensors = shown(
        lambda model, x: model(x).sum(),
        torch.tensor([0.1, 0.5]),
        model=model,
        steps=3,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        train_step=train_step,
    )
    assert (report.culprits[0].op, report.culprits[0].step) == ("aten::log", 0)
    assert report.batch == 1
    assert report.repro.works, report.repro.note
    assert tensors["self"].item() == pytest.approx(-0.1)
    assert model.seen == 1


def test_step_that_the_program_left_out(shown):
    """What it did before it gave up is what the script shows."""

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))
            self.register_buffer("seen", torch.ones(()))

    def loss_fn(model, x):
        with torch.no_grad():
            model.seen.copy_((x.min() - model.seen).log())
        return model.weight * x.sum()

    def train_step(model, batch, loss_fn, optimizer, scaler, step):
        model.zero_grad()
        if step == 0:
            loss_fn(model, *batch)
            return
        loss = model.weight * model.seen
        yield "loss", loss
        loss.backward()
        yield "grads", loss

    report, _, tensors = shown(
        loss_fn,
        torch.tensor([0.25, 0.5]),
        model=Norm(),
        steps=2,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        train_step=train_step,
    )
    assert (report.culprits[0].op, report.culprits[0].step) == ("aten::log", 0)
    assert report.repro.works, report.repro.note
    assert tensors["self"].item() == -0.75


def test_first_replay_that_runs_more(shown):
    """What a program makes when it is first used shifts the events of later replays."""
    made = []

    def loss(model, x):
        if not made:
            made.append((x * 2).log1p())
        y = (x + 1).log()
        return (model(x) / made[0] / y).sum()

    report, _, tensors = shown(loss, torch.tensor([0.0, 1.0]))
    assert report.culprits[0].op == "aten::div"
    assert report.repro.works, report.repro.note
    assert tensors["self"].item() == tensors["other"].item() == 0.0


def test_subject_is_untouched(shown):
    """No hook stays on a node that the program keeps, and no bit is changed."""
    kept = []

    def loss(model, x):
        kept.append(model(x).sqrt())
        return kept[-1].sum()

    model = Scale()
    x = torch.tensor([1.0, 0.0])
    report, _, _ = shown(loss, x, model=model)
    assert report.repro.is_backward
    assert model.weight.item() == 1.0
    assert model.weight.grad is None
    assert x.tolist() == [1.0, 0.0]


def test_hooks_are_taken_off():
    """A node that the program keeps bears no hook of ours after the replay."""
    captured = Captured(frozenset([0, 99]), lambda func, args, kwargs: func(*args, **kwargs))

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return captured.execute(func, args, kwargs or {})

    x = torch.tensor([1.0, 4.0], requires_grad=True)
    with Mode():
        y = x.sqrt()
        (y * 2).sum().backward(retain_graph=True)
    assert captured.incoming[0][0].tolist() == [2.0, 2.0]
    captured.close()
    y.sum().backward()
    assert captured.incoming[0][0].tolist() == [2.0, 2.0]


# -- what does not reproduce -----------------------------------------------------------------------


def test_op_of_a_library_does_not_reproduce(shown, monkeypatch):
    """Torch alone does not know it, and that is said."""
    monkeypatch.setattr(folder, "_ran", IN_A_PROCESS)
    with torch.library._scoped_library("nanhunt_test_repro", "FRAGMENT") as library:
        library.define("inverse(Tensor x) -> Tensor")
        library.impl("inverse", lambda x: 1 / x, "CompositeExplicitAutograd")
        report, text, _ = shown(
            lambda model, x: (
                torch.ops.nanhunt_test_repro.inverse(x).sum() + model(torch.ones(2)).sum()
            ),
            torch.tensor([0.0, 1.0]),
        )
    repro = report.repro
    assert "torch.ops.nanhunt_test_repro.inverse.default" in text
    assert not repro.works
    assert repro.shown == ""
    assert repro.note.startswith("the script did not run to its end: AttributeError: ")
    assert "does not reproduce" in sentence(report)


def test_finite_when_called_alone(shown):
    """An op whose result depends on more than its operands: the script is handed over as it is."""
    calls = []
    with torch.library._scoped_library("nanhunt_test_state", "FRAGMENT") as library:
        library.define("fails_early(Tensor x) -> Tensor")

        def fails_early(x):
            calls.append(1)
            return x / (0.0 if len(calls) <= 4 else 1.0)

        library.impl("fails_early", fails_early, "CompositeExplicitAutograd")
        op = torch.ops.nanhunt_test_state.fails_early
        report, _, _ = shown(lambda m, x: op(x).sum() + m(torch.ones(2)).sum(), torch.ones(2))
    assert not report.repro.works
    assert report.repro.folder
    told = "called alone it is finite: the result: 0 of 2 elements"
    assert report.repro.note.startswith(told)


def test_collective_is_not_called(shown, monkeypatch):
    """To call it alone would wait for the other ranks."""
    info = op_info(ATEN.log.default)._replace(is_collective=True)
    monkeypatch.setattr("nanhunt.repro.reproduction.op_info", lambda _: info)
    report, _, _ = shown(lambda model, x: model(x).log().sum(), torch.zeros(2))
    assert report.repro.note == "other ranks take part in it: it has no call alone"


def test_step_that_cannot_be_captured(shown, monkeypatch):
    """Where the copies do not fit, the report is there all the same."""

    def full(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("nanhunt.hunting.reproduction.reproduce", full)
    report, _, _ = shown(lambda model, x: model(x).log().sum(), torch.zeros(2))
    assert report.culprits[0].op == "aten::log"
    assert report.repro.note.startswith("it could not be made: OutOfMemoryError: no memory")


def test_operands_without_memory():
    """What has no numbers of its own cannot be saved."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = torch.ones(2)
    assert unfit(fake) == "an operand is a FakeTensor"
    assert unfit(torch.ones(2, device="meta")) == "an operand has no numbers of its own"
    assert unfit(torch.ones(2)) == unfit(nn.Parameter(torch.ones(2))) == ""
    assert mode is not None


# -- operands to the bit ---------------------------------------------------------------------------

BASE = torch.arange(24.0).reshape(4, 6)
LAYOUTS = {
    "transposed": BASE.t,
    "strided": lambda: BASE[::2, 1::2],
    "expanded": lambda: torch.tensor([1.0, NAN])[:, None].expand(2, 3),
    "overlapping": lambda: BASE.as_strided((3, 3), (2, 1)),
    "scalar": lambda: torch.tensor(-0.0),
    "empty": lambda: torch.empty(0, 3),
    "conjugate": lambda: torch.view_as_complex(torch.randn(3, 2)).conj(),
    "negative": lambda: torch.view_as_complex(torch.randn(3, 2)).conj().imag,
    "double": lambda: torch.randn(2, 3, dtype=torch.complex128).t(),
    "channels": lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "bfloat": lambda: torch.randn(5).bfloat16(),
    "flags": lambda: torch.tensor([True, False]),
    "float8": lambda: torch.randn(4).to(torch.float8_e5m2),
    "coo": lambda: torch.eye(3).to_sparse(),
    "uncoalesced": lambda: torch.sparse_coo_tensor(
        [[0, 0], [1, 1]], [1.0, 2.0], (2, 2), check_invariants=True
    ),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "csc": lambda: torch.eye(3).to_sparse_csc(),
}


def restored(scene, tmp_path):
    """The tensors that the script of a scene hands to its op."""
    place = tmp_path / "restored"
    folder.hand_over(pages_of(scene, FIRST, ["about"]), place)
    lines = (place / SCRIPT).read_text().splitlines()
    until = next(i for i, line in enumerate(lines) if line.startswith("y = "))
    names = {"__file__": str(place / SCRIPT)}
    exec("\n".join(lines[:until]), names)  # noqa: S102 - our own lines
    return names["t"]


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, tmp_path, monkeypatch):
    """Strides, conjugation, dtype and every bit come back as the op was given them."""
    monkeypatch.setattr(folder, "_ran", lambda place: (True, ""))
    tensor = LAYOUTS[name]()
    again = restored(Scene(ATEN.clone.default, (copied(tensor),), {}), tmp_path)["self"]
    assert (again.shape, again.dtype, again.layout) == (tensor.shape, tensor.dtype, tensor.layout)
    if tensor.layout is torch.strided:
        assert again.stride() == tensor.stride()
        assert (again.is_conj(), again.is_neg()) == (tensor.is_conj(), tensor.is_neg())
    else:
        again, tensor = again.to_dense(), tensor.to_dense()
    plain, wanted = (
        (t.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8))
        for t in (again, tensor)
    )
    assert torch.equal(plain, wanted)


def test_aliases(tmp_path, monkeypatch):
    """Views of one memory look at one memory again, and the same tensor is the same tensor."""
    monkeypatch.setattr(folder, "_ran", lambda place: (True, ""))
    base = torch.arange(6.0)
    left, right = copied((base[:3], base[3:]))
    scene = Scene(ATEN.add_.Tensor, (left, right), {})
    again = restored(scene, tmp_path)
    assert again["self"].untyped_storage()._cdata == again["other"].untyped_storage()._cdata
    assert again["self"].add_(again["other"]).tolist() == scene.results()[0].tensor.tolist()
    twice = Scene(ATEN.mul.Tensor, (left, left), {})
    assert list(twice.named) == ["self"]
    assert call_of(twice) == 'torch.mul(t["self"], t["self"])'


def test_random_op(tmp_path):
    """An op that draws, draws the same numbers again, and leaves the generator as it was."""
    torch.manual_seed(3)
    mean = torch.zeros(64)
    captured = Captured(frozenset([0]), lambda func, args, kwargs: func(*args, **kwargs))
    drawn = captured.execute(ATEN.normal.Tensor_float, (mean, 2e38), {})
    assert not drawn.isfinite().all()
    scene = Scene.of(captured.calls[0])
    before = torch.get_rng_state()
    assert torch.equal(scene.results()[0].tensor, drawn)
    assert torch.equal(torch.get_rng_state(), before)
    try:
        outcome = folder.hand_over(pages_of(scene, Look(0), ["about"]), tmp_path / "out")
    finally:
        torch.set_rng_state(before)
    bad = int((~drawn.isfinite()).sum())
    assert outcome.works
    assert outcome.shown.startswith(f"the result: {bad} of 64 elements NaN or infinite")


# -- reduction -------------------------------------------------------------------------------------


def cut(func, *args, look=FIRST, incoming=(), **kwargs):
    """The shapes of the operands after the reduction, by name."""
    small = reduced(Scene(func, args, kwargs, incoming), look)
    assert small.look.mask(small.scene.results()[small.look.position].tensor).any()
    return {name: tuple(tensor.shape) for name, tensor in small.scene.named.items()}


def spoiled(*shape, at, value):
    """Random numbers with another one somewhere."""
    tensor = torch.rand(*shape) + 0.5
    tensor[at] = value
    return tensor


def test_pointwise_is_cut_to_one_element():
    """Along every dimension, broadcast operands included."""
    x = spoiled(6, 5, 4, at=(2, 3, 1), value=0.0)
    shapes = cut(ATEN.div.Tensor, torch.rand(5, 1), x)
    assert shapes == {"self": (1, 1), "other": (1, 1, 1)}


def test_product_is_cut_to_a_row_and_a_column():
    """The inner dimension stays, square operands or not."""
    for columns in (7, 6):
        one, other = spoiled(6, 6, at=(1, 0), value=3e38), torch.full((6, columns), 1.5)
        assert cut(ATEN.mm.default, one, other) == {"self": (1, 6), "mat2": (6, 1)}


def test_batch_is_cut_and_the_matrix_stays():
    """A slice of a matrix has another inverse."""
    a = torch.eye(3).repeat(5, 1, 1)
    a[2, 1, 1] = 0.0
    b = torch.rand(5, 3, 2)
    shapes = cut(ATEN.linalg_solve_triangular.default, a, b, upper=True)
    assert shapes == {"self": (1, 3, 3), "B": (1, 3, 1)}


def test_slice_that_fails_for_a_reason_of_its_own():
    """One element of a running sum is finite, and the deviation of one number always is NaN."""
    x = torch.full((3, 4), 1e38)
    x[1] = 2e38
    assert cut(ATEN.cumsum.default, x, 1) == {"self": (1, 4)}
    y = torch.rand(4, 4)
    y[2, 1] = 3e38
    y[2, 2] = -3e38
    assert cut(ATEN.var.correction, y, [1], correction=1) == {"self": (1, 4)}


def test_gradient_is_cut_along():
    """The operand and the gradient that came to it stay of one size."""
    x = spoiled(8, 3, at=(5, 1), value=0.0).requires_grad_()
    shapes = cut(ATEN.sqrt.default, x, incoming=(torch.rand(8, 3),))
    assert shapes == {"self": (1, 1), "gradient": (1, 1)}


def test_element_beside_those_that_were_passed_on():
    """Where an operand is not finite itself, the element that was made so is looked at."""
    x = torch.tensor([[INF, 1.0], [2.0, 0.0]])
    scene = Scene(ATEN.reciprocal.default, (x,), {})
    look = Look(0, at=(1, 1))
    small = reduced(scene, look)
    assert small.scene.args[0].tolist() == [[0.0]]
    assert small.look == Look(0, at=(0, 0))
    assert not Look(0, at=(0, 0)).mask(scene.results()[0].tensor).any()


def test_not_reduced_keeps_its_memory_format(shown):
    """What cannot be cut is saved as it lay in memory."""
    x = torch.ones(4, 3).t()
    report, text, _ = shown(
        lambda model, x: torch.cumsum(model(x) * 1.5e38, 0).t().cumsum(0).sum() * 0.0, x
    )
    assert report.repro.works, report.repro.note
    assert "as_strided" in text or report.repro.operands[0][1] != report.repro.operands[0][2]


def test_operands_that_are_not_finite_are_named(shown):
    """A mask that was asked for becomes NaN: the script says what it held before the call."""
    x = torch.full((2, 3), -INF)
    report, text, _ = shown(lambda model, x: model(x).softmax(-1).sum(), x)
    assert report.repro.works
    assert report.repro.shown == "the result: 1 of 1 elements NaN, first [nan]"
    assert "self holds 1 of 1 non-finite before the call." in text
    assert "bad = torch.isnan(shown)" in text


# -- the spelling ----------------------------------------------------------------------------------

X = torch.rand(2, 3) + 1


@pytest.mark.parametrize(
    ("func", "args", "kwargs", "told"),
    [
        (ATEN.log.default, (X,), {}, 'torch.log(t["self"])'),
        (ATEN._softmax.default, (X, 1, False), {}, 'torch.softmax(t["self"], 1)'),
        (ATEN.add_.Tensor, (X, 2.5), {"alpha": NAN}, 't["self"].add_(2.5, alpha=float("nan"))'),
        (
            ATEN._to_copy.default,
            (X,),
            {"dtype": torch.float16},
            'torch.ops.aten._to_copy.default(t["self"], dtype=torch.float16)',
        ),
        (
            ATEN._foreach_sqrt.default,
            ([X, X + 1, X + 2, X + 3],),
            {},
            'torch.ops.aten._foreach_sqrt.default([t[f"self.{i}"] for i in range(4)])',
        ),
        (ATEN.special_erfcx.default, (X,), {}, 'torch.special.erfcx(t["self"])'),
        (
            ATEN.full.default,
            ([2], -INF),
            {"device": X.device},
            'torch.ops.aten.full.default([2], float("-inf"), device=torch.device("cpu"))',
        ),
    ],
    ids=lambda value: str(value)[:20],
)
def test_spelling(func, args, kwargs, told):
    """A public name where calling it runs the very same op, else the op itself."""
    scene = Scene(func, args, kwargs)
    assert call_of(scene) == told


def test_literals():
    """Every kind of argument can be read by Python."""
    for value in (1, -2.5, True, None, "mean", INF, complex(1, INF), [1, 2], torch.float32):
        assert repr(eval(literal(value, {}))) == repr(value)  # noqa: S307 - that is the claim
    assert literal(torch.channels_last, {}) == "torch.channels_last"
    assert literal(torch.Generator(), {}) == "None"


def test_hostile_words(tmp_path):
    """Whatever stands in a user's line, the script stays a script."""
    scene = Scene(ATEN.log.default, (torch.zeros(1),), {})
    about = ['"""', "\\", "\\N{DASH}", "a\x00b\r\nraise SystemExit(7)", "'''", '"', "\udc80é"]
    assert folder.hand_over(pages_of(scene, Look(0), about), tmp_path / "out").works


# -- the folder ------------------------------------------------------------------------------------


def pages():
    """A script that reproduces."""
    return pages_of(Scene(ATEN.log.default, (torch.zeros(1),), {}), Look(0), ["about"])


def test_folder_of_ours_is_replaced(tmp_path):
    """One of our own, or an empty one, gives way; nothing is left beside it."""
    out = tmp_path / "out"
    for _ in range(2):
        folder.hand_over(pages(), out)
    (tmp_path / "empty").mkdir()
    folder.hand_over(pages(), tmp_path / "empty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "out"]
    assert {p.name for p in out.iterdir()} == {SCRIPT, OPERANDS}


@pytest.mark.parametrize(
    ("name", "sentence_"),
    [
        ("full", "holds something that nanhunt did not write; name a new or an empty one"),
        ("alike", "holds something that nanhunt did not write; name a new or an empty one"),
        ("file", "is not a folder; name a new or an empty one"),
        ("no/where", "there is no folder"),
    ],
)
def test_folder_is_refused(tmp_path, name, sentence_):
    """What is somebody else's stays, and that is said before the work."""
    for full, file in (("full", "notes.txt"), ("alike", SCRIPT)):
        (tmp_path / full).mkdir()
        (tmp_path / full / file).write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match=sentence_):
        check_folder(tmp_path / name)
    with pytest.raises(UsageError, match=sentence_):
        Order(tmp_path / name)


def test_nothing_is_left_half_written(tmp_path, monkeypatch):
    """Where writing fails, the older script stays, and nothing lies beside it."""
    out = tmp_path / "out"
    folder.hand_over(pages(), out)
    before = (out / SCRIPT).read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for name in ("save", "_ran", "_put"):
        with monkeypatch.context() as patch:
            patch.setattr(folder, name, full)
            with pytest.raises(UsageError, match=r"cannot be written \(No space left on device\)"):
                folder.hand_over(pages(), out)
        assert (out / SCRIPT).read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("text", "works", "shown_"),
    [
        ("print('a')\nprint('reproduced')", True, "a"),
        ("print('a')\nprint('did not reproduce')\nraise SystemExit(1)", False, "a"),
        ("print(1)\nprint(2)\nraise KeyError('x')", None, "KeyError: 'x'"),
        ("import os\nos._exit(3)", None, "ended with exit code 3"),
        ("import time\ntime.sleep(60)", None, "took longer than 1 s"),
    ],
)
def test_outcomes_of_a_process(tmp_path, monkeypatch, text, works, shown_):
    """Only the word and the exit code together count."""
    monkeypatch.setattr(folder, "LIMIT", 1.0 if "sleep" in text else 60.0)
    (tmp_path / SCRIPT).write_text(text)
    assert IN_A_PROCESS(tmp_path) == (works, shown_)


# -- what is told of it ----------------------------------------------------------------------------

DONE = Reproduction(
    "out", works=True, operands=(("self", (64, 3), (1, 3)),), bytes=1234, bytes_before=768
)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "out/repro.py reproduces with torch alone (1.23 kB, 1 of 64 samples)"),
        (
            {"operands": (("w", (3, 9), (3, 1)),), "bytes": 2_500_000},
            "out/repro.py reproduces with torch alone (2.5 MB, w [3, 1] of [3, 9])",
        ),
        (
            {"operands": (("w", (), ()),), "bytes": 900, "note": "no gradient"},
            "out/repro.py reproduces with torch alone (900 B, all of the operands); no gradient",
        ),
        ({"works": False, "note": "why"}, "out/repro.py does not reproduce: why"),
        ({"folder": "", "works": False, "note": "why"}, "none: why"),
    ],
)
def test_sentence(changes, told):
    """One sentence: where it is, whether it works, how large it is."""
    report = Report("s", 0, "culprit", samples=64, repro=replace(DONE, **changes))
    assert sentence(report) == told
    assert sentence(Report("s", 0, "healthy")) == ""


def test_same_culprit():
    """Phase, op, line and cause count; from where the command runs does not."""
    one = Finding("forward", "aten::log", file="a/b.py", line=3, cause="pole")
    assert is_same(one, replace(one, file="../b.py", module="x", evidence=("y",)))
    for changes in ({"line": 4}, {"cause": None}, {"op": "aten::exp"}, {"phase": "backward"}):
        assert not is_same(one, replace(one, **changes))


def test_round_trip(tmp_path):
    """A report with a script comes back as it was."""
    report = Report("s", 0, "culprit", repro=DONE)
    store.save(report, tmp_path / "r.json")
    assert store.load(tmp_path / "r.json") == report
