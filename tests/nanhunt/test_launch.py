"""nanhunt run, the watching: what it sees, what it withholds, and that it changes nothing else."""

import contextlib
import os
import threading
import types
import warnings

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim import optimizer as hooks
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from nanhunt import store
from nanhunt.guarding import observer
from nanhunt.guarding.wires import WIRES
from nanhunt.launch import buffers, caution, sentry
from nanhunt.launch.desk import Desk, Order
from nanhunt.launch.gradients import are_finite, bad_among
from nanhunt.launch.ledger import Ledger
from nanhunt.launch.sentry import Sentry
from nanhunt.recorder.mode import Recorder

BOTH = pytest.mark.parametrize("mode", ["light", "full"])
LONG = os.environ.get("NANHUNT_LONG") == "1"


class Net(nn.Module):
    """Two layers with batch norm and dropout; `bad` plants an infinite derivative."""

    def __init__(self, *, recomputed=False):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)
        self.drop, self.recomputed = nn.Dropout(0.1), recomputed

    def middle(self, h):
        return torch.relu(self.norm(h))

    def forward(self, x, *, bad=False):
        h = self.body(x)
        h = checkpoint(self.middle, h, use_reentrant=False) if self.recomputed else self.middle(h)
        if bad:
            h = (h * 0).sqrt()  # planted
        return self.head(self.drop(h)).mean()


def plain(bad=(), *, steps=8, net=None, **options):
    """As most programs train."""
    net = net or Net(**options)
    adam = torch.optim.Adam(net.parameters())
    for i in range(steps):
        adam.zero_grad()
        net(torch.randn(6, 4), bad=i in bad).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adam.step()
        net.eval()
        with torch.no_grad():
            net(torch.randn(2, 4))
        net.train()
    return net


def recomputing(bad=()):
    return plain(bad, recomputed=True)


def scaled(bad=(), *, fused=False, scale=2.0**16, large=(2, 5)):
    """Under a gradient scaler, which skips what overflows."""
    net = Net()
    adam = torch.optim.Adam(net.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for i in range(8):
        adam.zero_grad()
        loss = net(torch.randn(6, 4), bad=i in bad) * (1e36 if i in large else 1.0)
        scaler.scale(loss).backward()
        if i % 2:
            scaler.unscale_(adam)
        scaler.step(adam)
        scaler.update()
    return net


def scaled_fused(bad=()):
    return scaled(bad, fused=True)


def accumulating(bad=()):
    net = Net()
    adam = torch.optim.AdamW(net.parameters())
    for i in range(16):
        net(torch.randn(6, 4), bad=i in bad).backward()
        if i % 2:
            adam.step()
            adam.zero_grad()
    return net


def adversarial(bad=()):
    """Two models, each with an optimizer; the backward of one leaves gradients in the other."""
    made, judge = Net(), Net()
    first, second = (torch.optim.Adam(net.parameters()) for net in (made, judge))
    for i in range(8):
        second.zero_grad()
        judge(torch.randn(6, 4)).backward()
        second.step()
        first.zero_grad()
        x = torch.randn(6, 4)
        (made(x, bad=i in bad) * judge(x)).backward()
        first.step()
    return nn.ModuleList([made, judge])


def searching(bad=()):
    """LBFGS calls its closure several times in a step."""
    net = Net()
    net.drop.p = 0.0
    lbfgs = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=4)
    for i in range(8):
        x = torch.randn(6, 4)

        def closure(x=x, i=i):
            lbfgs.zero_grad()
            loss = net(x, bad=i in bad).square()
            loss.backward()
            return loss

        lbfgs.step(closure)
    return net


def in_hooks(bad=()):
    """Each parameter is stepped as soon as its gradient is there."""
    net = Net()
    optimizers = {p: torch.optim.SGD([p], 0.1) for p in net.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for i in range(8):
        net(torch.randn(6, 4), bad=i in bad).backward()
    return net


def compiled(bad=()):
    net = Net()
    call = torch.compile(net, backend="eager")
    adam = torch.optim.Adam(net.parameters())
    for i in range(8):
        adam.zero_grad()
        call(torch.randn(6, 4), bad=i in bad).backward()
        adam.step()
    return net


def skipping(bad=()):
    """The program leaves non-finite steps out by itself."""
    net = Net()
    adam = torch.optim.Adam(net.parameters())
    for i in range(8):
        adam.zero_grad()
        net(torch.randn(6, 4), bad=i in bad).backward()
        if all(p.grad.isfinite().all() for p in net.parameters()):
            adam.step()
    return net


def by_hand(bad=()):
    net = Net()
    for i in range(8):
        net(torch.randn(6, 4), bad=i in bad).backward()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.sub_(0.1 * parameter.grad)
                parameter.grad = None
    return net


def in_thread(bad=()):
    box = []
    thread = threading.Thread(target=lambda: box.append(plain(bad)))
    thread.start()
    thread.join()
    return box[0] if box else None


PROGRAMS = [
    plain, recomputing, scaled, scaled_fused, accumulating, adversarial, searching, in_hooks,
    compiled, skipping, by_hand, in_thread,
]  # fmt: skip


@pytest.fixture
def watched(tmp_path):
    """Run something under a sentry as a program is, and say how that was."""

    @contextlib.contextmanager
    def watch(mode="light", **options):
        order = Order(mode, out=tmp_path / "out", name="test", command="nanhunt run x", **options)
        desk, ledger = Desk(order), Ledger()
        guard = Sentry(order, desk, ledger)
        told = types.SimpleNamespace(ledger=ledger, desk=desk, sentry=guard, code=None)
        torch.manual_seed(0)
        guard.attach()
        try:
            yield told
        except SystemExit as error:
            told.code = error.code
        finally:
            guard.leave()
        assert is_clean()

    return watch


def is_clean():
    """Whether nothing of ours is left in torch."""
    module = nn.modules.module
    return not (
        hooks._global_optimizer_pre_hooks
        or hooks._global_optimizer_post_hooks
        or module._global_forward_pre_hooks
        or torch._C._len_torch_dispatch_stack()
        or WIRES.own
        or hasattr(Optimizer.__init__, "__wrapped__")
        or hasattr(torch.autograd._engine_run_backward, "__wrapped__")
    )


def alone(program):
    """The state that a program ends in without us."""
    torch.manual_seed(0)
    return program().state_dict()


def is_same(state, other):
    return all(torch.equal(state[name], other[name]) for name in state)


@BOTH
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_healthy_program_computes_the_same_bits(program, mode, watched, capsys):
    """Nothing is said before the end, and nothing is left behind."""
    with watched(mode) as told:
        state = program().state_dict()
    assert is_same(alone(program), state)
    assert told.code is None
    assert capsys.readouterr().err == ""
    assert not told.ledger.withheld
    nothing = "nothing checked" if program is by_hand and mode == "light" else "nothing non-finite"
    assert nothing in told.ledger.closing()


@pytest.mark.parametrize(
    "program", [p for p in PROGRAMS if p not in (scaled, scaled_fused, in_thread)]
)
def test_a_culprit_is_named_when_it_comes_again(program, watched, capsys, tmp_path):
    """Light mode withholds the first failure and names the second; full mode names the first."""
    with watched() as told:
        program((3, 5))
    light = told.ledger
    if program is by_hand:
        assert light.closing().startswith("no optimizer of torch.optim stepped (8 backwards; ")
        assert told.desk.found == 0
    else:
        assert told.code == 1
        assert light.withheld or light.left_out
        report = store.load(tmp_path / "out" / "test-1.json")
        assert report.culprits[0].op == "aten::sqrt"
        assert report.culprits[0].source == "h = (h * 0).sqrt()  # planted"
        assert report.command == "nanhunt run x"
        assert "nanhunt show " in capsys.readouterr().err
    with watched("full") as told:
        program((3,))
    assert told.code == 1
    assert told.desk.found == 1


@pytest.mark.parametrize("fused", [False, True])
@BOTH
def test_a_scale_that_falls_to_nothing(fused, mode, watched, capsys):
    """A skip is healthy above a scale of 1; at 1 there is no smaller one to go to."""
    with watched(mode) as told:
        scaled(range(2, 8), fused=fused, scale=4.0, large=())
    assert told.code == 1
    assert told.ledger.skipped >= 2
    assert "and a smaller one is no" in capsys.readouterr().err


def test_skips_of_a_scaler_are_counted(watched):
    """They are steps that did not happen."""
    with watched() as told:
        scaled()
    assert told.ledger.closing().startswith(
        "watched 6 optimizer steps of 1 optimizer (Adam), 2 more skipped by a GradScaler · "
        "nothing non-finite · not watched: "
    )


def test_a_withheld_step_leaves_no_trace(watched, capsys):
    """Parameters, state of the optimizer and buffers are those of before; gradients are kept."""
    net, x = Net(), torch.randn(6, 4)
    with watched() as told:
        adam = torch.optim.Adam(net.parameters())
        for _ in range(2):
            adam.zero_grad()
            net(x).backward()
            adam.step()
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        moments = [state["exp_avg"].clone() for state in adam.state.values()]
        adam.zero_grad()
        net(x * torch.inf).backward()
        adam.step()
        after = net.state_dict()
        assert all(not p.grad.isfinite().all() for p in net.body.parameters())
    same = [name for name in after if torch.equal(before[name], after[name])]
    assert set(after) - set(same) == {"norm.num_batches_tracked"}  # no floating buffer
    assert all(map(torch.equal, moments, [state["exp_avg"] for state in adam.state.values()]))
    assert told.ledger.withheld == [3]
    assert "nanhunt: optimizer step 3 of Adam was withheld: " in (said := capsys.readouterr().err)
    assert "2 buffers put back as at the last good step; the recorder goes on until" in said
    assert "no culprit named: it did not come again" in told.ledger.closing()


def test_the_first_step_of_all(watched):
    """Buffers are copied when the optimizer is made."""
    net = Net()
    with watched() as told:
        sgd = torch.optim.SGD(net.parameters(), 0.1)
        net(torch.full((6, 4), torch.nan)).backward()
        sgd.step()
    assert told.ledger.withheld == [1]
    assert all(tensor.isfinite().all() for tensor in net.state_dict().values())


def test_averages_of_the_parameters_are_left_alone(watched):
    """A buffer that the program itself changes after the step keeps what it was given."""
    net = Net()
    average = nn.Module()
    average.register_buffer("mean", torch.zeros(8, 4))
    with watched():
        sgd = torch.optim.SGD(net.parameters(), 0.1)
        for i in range(2):
            net(torch.randn(6, 4), bad=i == 1).backward()
            sgd.step()
            average.mean.copy_(net.body.weight.detach() + i)
    assert torch.equal(average.mean, net.body.weight + 1)


def test_large_constants_are_copied_once(monkeypatch):
    """They are copied anew only when something has written to them; too many are left out."""
    module = nn.Module()
    module.register_buffer("table", torch.zeros(buffers._SMALL))
    found = buffers.Buffers()
    found._modules.add(module)
    found.keep()
    kept = found._copies[module]["table"][0]
    kept.fill_(1.0)
    found.keep()
    assert kept[0] == 1.0
    module.table.add_(2.0)
    found.keep()
    assert kept[0] == 2.0
    monkeypatch.setattr(buffers, "LIMIT", 1)
    module.register_buffer("more", torch.zeros(2))
    found.keep()
    assert found.left_out == 1


def test_each_culprit_is_told_once_when_going_on(watched, capsys, tmp_path):
    """The program runs to its end, each failing step is withheld, and only the new is told."""
    with watched(keep_going=True) as told:
        net = plain((2, 3, 4, 6))
    assert told.code is None
    assert told.desk.found == 1
    assert told.ledger.withheld == [3, 4, 5, 7]
    assert all(p.isfinite().all() for p in net.parameters())
    assert capsys.readouterr().err.count("nanhunt: culprit at optimizer step 4") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["test-1.json"]
    with watched(keep_going=True):  # reports of earlier runs stay
        plain((2, 3))
    assert (tmp_path / "out" / "test-2.json").exists()


def test_the_recorder_goes_after_enough_good_steps(watched, capsys):
    """And comes again with the next failure."""
    with watched(quiet=2) as told:
        plain((1, 6), steps=8)
    assert told.ledger.withheld == [2, 7]
    assert "nanhunt: not seen again in 2 steps; the recorder goes off\n" in capsys.readouterr().err


@BOTH
def test_the_first_steps_may_go_by(mode, watched):
    """Nothing is looked at until then."""
    with watched(mode, after_step=4, keep_going=True) as told:
        skipping((1, 6, 7))  # the program itself leaves them out
    assert told.desk.found == 1
    assert "not watched: the first 4 steps, " in told.ledger.closing()


def test_a_loss_alone(watched, capsys):
    """A loss that is not finite with finite gradients: the step is taken, and the op named."""
    net = Net()
    with watched() as told:
        sgd = torch.optim.SGD(net.parameters(), 0.1)
        for i in range(5):
            sgd.zero_grad()
            (net(torch.randn(6, 4)) + torch.full((), float(i % 2)).sub(1).log().detach()).backward()
            sgd.step()
    assert told.code == 1
    assert told.ledger.withheld == []
    assert told.ledger.odd_losses == 1
    assert "where     log, in the forward" in capsys.readouterr().err


def test_parameters_spoiled_by_an_earlier_step(watched, capsys):
    """Light mode cannot name who did it, and says so."""
    net = Net()
    with watched() as told:
        sgd = torch.optim.SGD(net.parameters(), 0.1)
        for i in range(4):
            sgd.zero_grad()
            net(torch.randn(6, 4)).backward()
            sgd.step()
            if i == 1:
                net.body.weight.data[0] = torch.inf
    assert told.code == 1
    said = capsys.readouterr().err
    assert "1 of 6 parameters were not finite before, so an earlier step did that (--mode" in said
    assert "param:Net.body.weight" in said


def test_gradients_spoiled_after_the_backward(watched, capsys):
    """What the program itself does to them is recorded too."""
    net = Net()
    with watched() as told:
        sgd = torch.optim.SGD(net.parameters(), 0.1)
        for _ in range(2):
            sgd.zero_grad()
            net(torch.randn(6, 4)).backward()
            net.head.bias.grad /= 0.0
            sgd.step()
    assert told.code == 1
    assert "net.head.bias.grad /= 0.0" in capsys.readouterr().err


def test_an_end_that_the_program_swallows(watched):
    """It is not watched any further, and the exit code is decided where it ends."""
    with watched("full") as told:
        with contextlib.suppress(BaseException):
            plain((3,))
        plain((2,))
    assert told.desk.found == 1
    assert told.ledger.culprits == 1


@BOTH
def test_detect_inside(mode, watched):
    """A block of `nanhunt.detect` within the program is its own."""
    import nanhunt

    with watched(mode) as told:
        with nanhunt.detect():
            plain(steps=2)
        plain((1, 3, 5), steps=6)
    assert told.code == 1


FAULTS = {
    "look": (sentry, "are_finite"),
    "root": (observer.Names, "meet"),
    "suspects": (observer, "find_suspects"),
    "sink": (observer, "read_sink"),
    "letting go": (observer.Observer, "forget"),
    "hot path": (Recorder, "_follow"),
    "buffers": (buffers.Buffers, "keep"),
}


@BOTH
@pytest.mark.parametrize("fault", FAULTS)
def test_our_own_failure_never_ends_the_program(fault, mode, watched, monkeypatch, capsys):
    """One warning, and the program goes on unwatched to the state that it had reached alone."""

    def fail(*_args, **_kwargs):
        raise RuntimeError("planted in nanhunt")

    monkeypatch.setattr(*FAULTS[fault], fail)
    with watched(mode, keep_going=True) as told:
        net = plain((2, 5))
        steps = told.ledger.steps
    warned = capsys.readouterr().err.count("nanhunt: nanhunt failed with RuntimeError: planted in ")
    if mode == "full" and fault in ("look", "buffers"):
        assert (warned, steps) == (0, 8)  # not used there
    else:
        assert warned == 1
        assert "then unwatched: nanhunt failed with RuntimeError" in told.ledger.closing()
    if mode == "full" or fault in ("look", "buffers"):  # nothing had been withheld by then
        own = alone(lambda: plain((2, 5)))
        exactly = {"rtol": 0, "atol": 0, "equal_nan": True}
        for name, tensor in net.state_dict().items():
            torch.testing.assert_close(tensor, own[name], **exactly)


@BOTH
def test_errors_of_the_program_pass(mode, watched):
    """They are its own, from the forward, a backward and a closure, and it is watched further."""

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x):
            return x.clone()

        @staticmethod
        def backward(_ctx, _gradient):
            raise KeyError("the program's own")

    with watched(mode) as told:
        net = plain(steps=2)
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            net(torch.randn(3, 5))
        with pytest.raises(KeyError, match="the program's own"):
            Failing.apply(net(torch.randn(3, 4))).backward()
        lbfgs = torch.optim.LBFGS(net.parameters())
        with pytest.raises(KeyError, match="the program's own"):
            lbfgs.step(lambda: Failing.apply(net(torch.randn(3, 4))).backward())
        plain((1,), steps=3)
    assert told.ledger.failure == ""
    assert told.desk.found + len(told.ledger.withheld) == 1


def test_a_folder_that_cannot_be_written(watched, tmp_path, capsys):
    """The report is on stderr all the same."""
    (tmp_path / "out").write_text("a file")
    with watched("full") as told:
        plain((2,))
    assert told.code == 1
    said = capsys.readouterr().err
    assert said.count("no report can be written to ") == 1
    assert "where     sqrt, in its backward" in said


def test_the_rank_is_in_the_name(watched, tmp_path, monkeypatch, capsys):
    """Each process under torchrun writes its own report."""
    monkeypatch.setenv("RANK", "1")
    with watched("full"):
        plain((2,))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["test-rank1-1.json"]
    assert capsys.readouterr().err.startswith("nanhunt, rank 1: culprit at optimizer step 3\n")


def test_memory_is_flat(watched, monkeypatch):
    """Over many iterations the recorder holds some of them only; without a backward as well."""
    monkeypatch.setattr(caution, "_CEILING", 5_000)
    with watched("full") as told:
        net = Net()
        sgd = torch.optim.SGD(net.parameters(), 0.1)
        x, held = torch.randn(6, 4), []
        for _ in range(20_000 if LONG else 1_000):
            sgd.zero_grad()
            net(x).square().backward()
            sgd.step()
            held.append(told.sentry._alarm.observer.recorder.position)
        for _ in range(12_000):
            x.add_(1.0)
        held.append(told.sentry._alarm.observer.recorder.position)
    assert max(held) < 2 * caution.KEPT + 5_000 + 200
    assert told.ledger.steps in (1_000, 20_000)


@BOTH
def test_parameters_that_are_made_of_others(watched, tmp_path, mode):
    """Their numbers are in other tensors; reading their own memory would end the process."""
    net = nn.Linear(4, 3)
    net.weight = nn.Parameter(TwoTensor(net.weight.detach(), net.weight.detach().clone()))
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    with watched(mode) as told:
        for i in range(6):
            sgd.zero_grad()
            y = net(torch.randn(5, 4))
            ((y * 0).sqrt() if i in (1, 3) else y).sum().backward()
            sgd.step()
    assert told.code == 1
    assert store.load(tmp_path / "out" / "test-1.json").culprits[0].op == "aten::sqrt"


def test_the_cheap_look():
    """Exact on every kind of gradient that there is; large finite ones are cleared."""
    large = torch.full((10,), 3e38)
    half = torch.full((4096,), 6e4, dtype=torch.float16)
    sparse = torch.sparse_coo_tensor([[0]], [1.0], (4,), check_invariants=False)
    fine = [large, half, sparse, torch.ones(3, dtype=torch.complex64), torch.ones(2, 3).t()]
    fine += [torch.ones(3, dtype=torch.bfloat16), torch.ones(1).expand(5), torch.ones(0)]
    assert are_finite(fine)
    for value in (torch.nan, torch.inf):
        for dtype in (torch.float16, torch.float32, torch.float64, torch.complex64):
            wrong = torch.ones(5, dtype=dtype)
            wrong[3] = value
            assert not are_finite([*fine, wrong])
            assert bad_among([*fine, wrong]) == [len(fine)]
    assert not are_finite([sparse * torch.inf])


def test_no_warning_is_left_switched_off(watched):
    """The filters of the program are as they were."""
    before = list(warnings.filters)
    with watched("full"):
        plain(steps=1)
    assert list(warnings.filters) == before
