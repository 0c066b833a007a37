"""watch: what it does with a step that is not finite, that raises, or that means nothing."""

import gc
import inspect
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import optimizer as optimizers

import nanhunt
from nanhunt.capsule import open_capsule, read_capsule
from nanhunt.errors import NonFiniteError, UsageError
from nanhunt.generators import read_generators
from nanhunt.guarding.wires import WIRES
from nanhunt.replay import replay
from nanhunt.subject import Subject
from nanhunt.watching import keeping, moment

INF, NAN = math.inf, math.nan


def line_of(text):
    """The line of this file that ends in a mark."""
    lines = inspect.getsource(inspect.getmodule(line_of)).splitlines()
    return next(n for n, line in enumerate(lines, 1) if line.endswith(f"# {text}"))


class Net(nn.Module):
    """Two layers and a batch norm, and a root in which 0 has no slope."""

    def __init__(self, rate=0.0):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)
        self.drop = nn.Dropout(rate)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.body(x))).relu())


def loss_of(model, x):
    """Finite everywhere; its gradient is not where a row of x is 0."""
    size = (x * model.body.weight[0]).square().sum(1).sqrt()  # the root
    return model(x).square().mean() + 0.1 * size.mean()


GOOD = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
POOR = torch.cat([GOOD[:7], torch.zeros(1, 4)])


def started(rate=0.0, **options):
    """A model, its optimizer, a watch and what it reports."""
    torch.manual_seed(0)
    model = Net(rate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    told = []
    options = {"on_report": told.append, "budget": 0} | options
    return model, optimizer, nanhunt.watch(model, optimizer, **options), told


def bits(model, optimizer):
    """All that a step may change."""
    states = [v.clone() for s in optimizer.state.values() for v in s.values()]
    drawn = read_generators()
    return [
        *(p.detach().clone() for p in (*model.parameters(), *model.buffers())),
        *states, drawn.cpu, drawn.python,
    ]  # fmt: skip


def same(one, other):
    """Whether two such states are the same."""
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def traces():
    """What a watch could leave behind in torch and Python."""
    module = nn.modules.module
    hooks = (
        optimizers._global_optimizer_pre_hooks, optimizers._global_optimizer_post_hooks,
        module._global_forward_pre_hooks, module._global_forward_hooks,
        module._global_backward_hooks, module._global_backward_pre_hooks,
    )  # fmt: skip
    return (
        [len(each) for each in hooks], torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(), threading.active_count(), WIRES.own,
        torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu"),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_left():
    """No hook, mode or thread outlives a test."""
    before = traces()
    yield
    assert traces() == before


# -- a step that is not finite ---------------------------------------------------------------


def test_a_failing_step_is_skipped_and_explained():
    """The report names op and line; the training is as after a plain skip."""
    model, optimizer, watch, told = started(rate=0.3)
    watch.step(lambda: loss_of(model, GOOD))
    before = bits(model, optimizer)
    outcome = watch.step(lambda: loss_of(model, POOR), batch=POOR)

    assert (outcome.stepped, outcome.why, outcome.step) == (False, "nonfinite", 1)
    assert str(outcome) == "step 1: gradients are not finite"
    assert outcome.norms["head"] < INF
    assert math.isnan(outcome.norms["body"])
    culprit = outcome.report.culprits[0]
    assert (culprit.op, culprit.line) == ("aten::sqrt", line_of("the root"))
    assert outcome.report.batch == 1
    assert outcome.report.samples == 8
    assert outcome.report.notes[0] == "in training: at step 1 1 of 6 gradients are not finite"
    assert told == [outcome.report]
    assert all(p.grad is None for p in model.parameters())

    # A plain loop that skips has run the forward: buffers and generators have moved on.
    after, count = bits(model, optimizer), len(list(model.parameters()))
    assert same(before[:count], after[:count])
    torch.manual_seed(0)
    twin = Net(0.3)
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    loss_of(twin, GOOD).backward()
    twin_optimizer.step()
    loss_of(twin, POOR).backward()
    assert same(after, bits(twin, twin_optimizer))


def test_each_culprit_is_told_once(capsys):
    """The same one again is known, another one is new; the report is printed on stderr."""
    model, _, watch, _ = started(on_report=None)

    def other():
        return model(GOOD).mean() + (model.head.bias * 0.0).log().sum()  # the log

    first = watch.step(lambda: loss_of(model, POOR))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("CULPRIT") == 1
    assert f"test_watching.py:{line_of('the root')} in loss_of" in printed.err
    again = watch.step(lambda: loss_of(model, POOR))
    assert again.report is first.report
    assert capsys.readouterr().err == ""
    assert watch.step(other).why == "loss"
    assert f"test_watching.py:{line_of('the log')}" in capsys.readouterr().err
    assert watch.step(lambda: loss_of(model, GOOD)).stepped


def test_raising():
    """The error carries the report, and the training can go on after it."""
    model, optimizer, watch, told = started(policy="raise")
    before = bits(model, optimizer)[: len(list(model.parameters()))]
    with pytest.raises(NonFiniteError, match=r"the loss is finite .* 1 of 6 gradients") as caught:
        watch.step(lambda: loss_of(model, POOR))
    assert caught.value.report is told[0]
    assert "test_watching.py" in str(caught.value)
    assert same(before, bits(model, optimizer)[: len(before)])
    assert watch.step(lambda: loss_of(model, GOOD)).stepped
    assert [f.why for f in watch.figures] == ["nonfinite", ""]


def test_stopping_after_so_many_in_a_row():
    """A good step in between starts the count anew."""
    model, _, watch, _ = started(stop_after=2)
    for x in (POOR, GOOD, POOR):
        watch.step(lambda: loss_of(model, x))
    with pytest.raises(NonFiniteError, match=r"^stopped: 2 steps in a row were not finite\n"):
        watch.step(lambda: loss_of(model, POOR))


def test_buffers_that_the_forward_spoils_are_put_back():
    """A NaN in the batch would stay in the running statistics for ever."""
    model, _, watch, _ = started()
    watch.step(lambda: model(GOOD).square().mean())
    before = [b.clone() for b in model.buffers()]
    poor = GOOD.clone()
    poor[2, 1] = NAN
    outcome = watch.step(lambda batch: model(batch).square().mean(), batch=poor)
    assert (outcome.why, outcome.report.culprits[0].where) == ("loss", "batch")
    note = "the forward made a buffer non-finite: all buffers are as before the step"
    assert outcome.notes == (note,)
    assert same(before, list(model.buffers()))


def test_an_infinite_loss_with_finite_gradients_is_not_trusted():
    """A plain loop would step; what looks sanitised is said to be."""
    model, _, watch, _ = started()
    outcome = watch.step(lambda: model(GOOD).mean() + torch.tensor(INF))
    assert (outcome.why, outcome.loss) == ("loss", INF)
    assert outcome.notes == ("the loss is not finite and every gradient is",)
    assert watch.figures[0].loss is None


def test_large_gradients_are_finite():
    """The squares of large numbers do not fit into float32; that is no failure."""
    model = nn.Linear(4, 1, bias=False)
    watch = nanhunt.watch(model, torch.optim.SGD(model.parameters(), lr=1e-30), clip=1e30)
    outcome = watch.step(lambda: model(torch.full((1, 4), 1e25)).sum())
    assert outcome.stepped
    assert outcome.norm == pytest.approx(2e25)


def test_precisions_see_the_batch_that_the_closure_holds():
    """Its tensors are cast for a replay and hold their own memory again afterwards."""
    model, _, watch, _ = started(variants=["fp64"])
    batch = {"x": POOR.clone()}
    home = batch["x"].data_ptr()
    outcome = watch.step(lambda: loss_of(model, batch["x"]), batch=batch)
    by_name = {run.variant: run for run in outcome.report.runs}
    assert by_name["fp64"].culprit_dtype == "float64"
    assert by_name["fp64"].raised is None
    assert batch["x"].dtype == torch.float32
    assert batch["x"].data_ptr() == home
    assert torch.equal(batch["x"], POOR)


def test_a_batch_that_the_closure_does_not_use():
    """Nothing is claimed of its samples."""
    model, _, watch, _ = started()
    outcome = watch.step(lambda: loss_of(model, POOR), batch=POOR.clone())
    assert outcome.report.samples is None
    assert outcome.report.culprits[0].op == "aten::sqrt"


# -- scalers ---------------------------------------------------------------------------------


def test_a_scale_without_remedy_is_hunted():
    """At a scale of 1 an overflow is the program's own, and the scaler still lowers its scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    model, _, watch, told = started(scaler=scaler)
    outcome = watch.step(lambda: loss_of(model, POOR))
    assert (outcome.why, outcome.scale, scaler.get_scale()) == ("nonfinite", 1.0, 0.5)
    assert told[0].culprits[0].op == "aten::sqrt"
    assert watch.step(lambda: loss_of(model, GOOD)).stepped


def test_many_overflows_in_a_row_are_hunted():
    """A NaN does not go away with the scale; until then each skip is normal."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    model, _, watch, told = started(scaler=scaler)
    whys = [watch.step(lambda: loss_of(model, POOR)).why for _ in range(18)]
    assert whys == ["scaler"] * 16 + ["nonfinite"] * 2
    assert len(told) == 1
    assert scaler.get_scale() == 2.0**12


def test_a_loss_that_is_not_finite_leaves_the_scale():
    """Where the gradients are finite there is nothing that a smaller scale mends."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model, _, watch, _ = started(scaler=scaler)
    assert watch.step(lambda: model(GOOD).mean() + torch.tensor(INF)).why == "loss"
    assert scaler.get_scale() == 1024.0
    assert watch.step(lambda: loss_of(model, GOOD)).stepped


# -- what the optimizer made non-finite ------------------------------------------------------


def spoilt(**options):
    """A training whose second step divides 0 by 0 in the optimizer."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), eps=0.0, foreach=False)
    told = []
    watch = nanhunt.watch(model, optimizer, on_report=told.append, budget=0, **options)
    zero = GOOD.clone()
    zero[:, 2] = 0.0
    first = watch.step(lambda: model(zero).square().mean())
    assert first.stepped
    return watch.step(lambda: model(GOOD).square().mean()), model, optimizer


def test_a_parameter_that_the_step_spoilt_is_named():
    """With a copy from before it, the optimizer's own operation is found."""
    outcome, model, optimizer = spoilt(keep_previous=True)
    culprit = outcome.report.culprits[0]
    assert (outcome.why, culprit.phase, culprit.op) == ("parameters", "optimizer", "aten::addcdiv_")
    assert outcome.report.notes[0] == (
        "in training: at step 1 1 of 2 parameters are not finite (weight); they were made so by "
        "the optimizer in step 0"
    )
    assert model.weight.isnan().sum() == 1
    assert float(optimizer.state[model.weight]["step"]) == 1.0


def test_a_parameter_that_the_step_spoilt_without_a_copy():
    """It is found where the next step starts, and the report says how to know more."""
    outcome, _, _ = spoilt()
    culprit = outcome.report.culprits[0]
    assert (outcome.why, culprit.phase) == ("parameters", "data")
    assert culprit.where == "param:weight"
    assert outcome.report.notes[0].endswith(
        "made so by the optimizer in step 0; watch(keep_previous=True) replays that step and names "
        "the operation"
    )


# -- what does not come again ----------------------------------------------------------------


def test_a_closure_with_side_effects_does_not_reproduce():
    """The report says what the closure draws and writes."""
    model, _, watch, told = started()
    stream = iter([POOR, GOOD, GOOD, GOOD])
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        return loss_of(model, next(stream))

    outcome = watch.step(closure)
    assert outcome.why == "nonfinite"
    report = told[0]
    assert report.verdict == "unexplained"
    assert report.headline.startswith("did not reproduce: at step 0 1 of 6 gradients are not")
    assert report.notes == (
        "no recorded operation is known to be non-deterministic on cpu",
        "the closure holds the iterator 'stream': each call draws further items",
        "the closure writes the variable 'calls'",
        "state outside the model and the random generators is not put back",
    )
    assert watch.step(lambda: loss_of(model, GOOD)).stepped


def test_an_iterator_that_ends_in_the_replay():
    """A replay that raises is told, and the training goes on."""
    model, _, watch, told = started()
    stream = iter([POOR])
    watch.step(lambda: loss_of(model, next(stream)))
    assert (
        "it could not be replayed: an iterator that the closure draws from has ended"
        in told[0].headline
    )
    assert watch.step(lambda: loss_of(model, GOOD)).stepped


def test_dropout_comes_again():
    """The replay starts where the generators stood, so the same units are dropped."""
    model, _, watch, _ = started(rate=0.5)

    def closure():
        kept = model.drop(torch.ones(64))
        return loss_of(model, GOOD) + (kept - 2.0).abs().sum() + model.body.bias[0] * rare(kept)

    def rare(kept):
        return (kept[:5].sum() - 10.0).sqrt()  # NaN unless five of five are kept

    whys = [watch.step(closure).why for _ in range(3)]
    assert whys == ["loss"] * 3
    assert watch.step(lambda: loss_of(model, GOOD)).stepped


# -- other loops -----------------------------------------------------------------------------


def test_an_optimizer_that_evaluates_the_loss():
    """LBFGS is left before it has changed anything, and steps again afterwards."""
    torch.manual_seed(0)
    model, told = Net().eval(), []
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    watch = nanhunt.watch(model, optimizer, on_report=told.append, budget=0)
    assert watch.step(lambda: loss_of(model, GOOD)).stepped
    before = [p.detach().clone() for p in model.parameters()]
    assert watch.step(lambda: loss_of(model, POOR)).why == "nonfinite"
    assert same(before, list(model.parameters()))
    assert told[0].culprits[0].line == line_of("the root")
    assert watch.step(lambda: loss_of(model, GOOD)).stepped
    assert not same(before, list(model.parameters()))


def test_what_a_replay_does_to_other_models():
    """Buffers and gradients of a model that the closure goes through are as after one forward."""

    def trained(*, watched):
        torch.manual_seed(0)
        maker, judge = nn.Linear(4, 4), Net()
        optimizer = torch.optim.Adam(maker.parameters())

        def closure():
            made = maker(GOOD)
            return judge(made).mean() + (made * 0).square().sum().sqrt()

        if watched:
            watch = nanhunt.watch(maker, optimizer, on_report=lambda _: None, budget=0)
            assert watch.step(closure).why == "nonfinite"
        else:
            closure().backward()
            optimizer.zero_grad()
        return [*judge.buffers(), *(p.grad for p in judge.parameters())]

    assert same(trained(watched=False), trained(watched=True))


def test_a_compiled_model():
    """It is replayed eagerly and stays compiled."""
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model, _, _, told = started()
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    watch = nanhunt.watch(compiled, optimizer, on_report=told.append, budget=0)

    def loss(x):
        return compiled(x).square().mean() + (x * model.body.weight[0]).square().sum(1).sqrt().sum()

    assert watch.step(lambda: loss(GOOD)).stepped
    assert watch.step(lambda: loss(POOR)).why == "nonfinite"
    assert told[0].culprits[0].op == "aten::sqrt"
    assert watch.step(lambda: loss(GOOD)).stepped
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_several_optimizers_share_an_overflow():
    """Where gradients are clipped by one norm and it overflows, none of the optimizers steps."""
    torch.manual_seed(0)
    model = Net()
    pair = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model.body, model.head)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    watch = nanhunt.watch(model, pair, scaler=scaler, clip=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    assert watch.step(lambda: loss_of(model, POOR)).why == "scaler"
    assert same(before, list(model.parameters()))
    assert scaler.get_scale() == 2.0**9
    assert watch.step(lambda: loss_of(model, GOOD)).stepped


# -- micro-batches ---------------------------------------------------------------------------


def test_the_micro_batch_that_failed_is_replayed():
    """Although the loop variable means another batch by then."""
    model, _, watch, told = started(accumulate=3)
    outcomes = []
    for batch in (GOOD, POOR, GOOD):
        outcomes.append(watch.step(lambda: loss_of(model, batch), batch=batch))
    assert [o.why for o in outcomes] == ["accumulating", "accumulating", "nonfinite"]
    assert told[0].culprits[0].line == line_of("the root")
    assert batch is GOOD
    assert all(watch.step(lambda: loss_of(model, GOOD)).report is None for _ in range(3))
    assert watch.figures[-1].stepped


# -- what raises -----------------------------------------------------------------------------


class Boom(nn.Module):
    """A layer that raises once, in the forward or in the backward."""

    def __init__(self, where, error):
        super().__init__()
        self.where, self.error = where, error

    def forward(self, x):
        if self.where == "forward":
            self.where = ""
            raise self.error
        if self.where == "backward":
            x.register_hook(self.blow)
        return x

    def blow(self, _gradient):
        self.where = ""
        raise self.error


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_that_raises_has_not_been(where, error, scaled):
    """Generators and buffers are put back, gradients dropped; the next step is taken."""
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    model, optimizer, watch, _ = started(rate=0.3, scaler=scaler)
    model.head = nn.Sequential(model.head, Boom("", error))
    watch.step(lambda: model(GOOD).square().mean())
    before = bits(model, optimizer)
    model.head[1].where = where
    with pytest.raises(type(error)):
        watch.step(lambda: model(GOOD).square().mean())
    assert same(before, bits(model, optimizer))
    assert all(p.grad is None for p in model.parameters())
    assert watch.step(lambda: model(GOOD).square().mean()).stepped
    assert [f.why for f in watch.figures] == ["", "raised", ""]


def test_an_interrupted_replay():
    """Ctrl-C while the culprit is looked for leaves everything as if the step had not been."""
    model, optimizer, watch, _ = started(rate=0.3)
    watch.step(lambda: loss_of(model, GOOD))
    before, calls = bits(model, optimizer), []

    def closure():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss_of(model, POOR)

    with pytest.raises(KeyboardInterrupt):
        watch.step(closure)
    assert same(before, bits(model, optimizer))
    assert watch.step(lambda: loss_of(model, GOOD)).stepped


def test_an_optimizer_that_raises():
    """A scaler can be used again afterwards."""
    scaler = torch.amp.GradScaler("cpu")
    model, optimizer, watch, _ = started(scaler=scaler)

    def refuse(*_):
        raise RuntimeError("no memory")

    handle = optimizer.register_step_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="no memory"):
        watch.step(lambda: loss_of(model, GOOD))
    handle.remove()
    assert scaler.get_scale() == 65536.0
    assert watch.step(lambda: loss_of(model, GOOD)).stepped


def test_re_entrance_is_refused():
    """A step inside a step, with one sentence."""
    model, _, watch, _ = started()

    def closure():
        watch.step(lambda: loss_of(model, GOOD))

    with pytest.raises(UsageError, match=r"^a step of this watch is running: neither its closure"):
        watch.step(closure)
    assert watch.step(lambda: loss_of(model, GOOD)).stepped


# -- what means nothing ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("closure", "message"),
    [
        (lambda m: 3, r"step takes a function that computes the loss, .*; got an object of type"),
        (lambda m: lambda: None, r"the closure is to return the loss, .*; got None"),
        (lambda m: lambda: (m(GOOD).mean(), 1), r"the closure is to return .* type tuple"),
        (lambda m: lambda: m(GOOD), r"the loss is to be a scalar; got shape \[8, 1\]"),
        (lambda m: lambda: m(GOOD).mean().detach(), r"the loss has no graph"),
        (lambda m: dict, r"the closure returned an empty mapping"),
        (lambda m: lambda: {"a": m(GOOD)}, r"the terms of a loss are scalar tensors; 'a' is none"),
        (lambda m: lambda x: m(x).mean(), r"the closure takes the batch .* none was given"),
        (lambda m: lambda x, y: m(x).mean(), r"the closure takes no argument, .* takes 2"),
    ],
)
def test_closures_that_mean_nothing(closure, message):
    """One sentence each, and the next step is taken."""
    model, optimizer, watch, _ = started()
    before = bits(model, optimizer)
    with pytest.raises(UsageError, match=message):
        watch.step(closure(model))
    assert same(before, bits(model, optimizer))
    assert watch.step(lambda: loss_of(model, GOOD)).stepped


def lbfgs(model):
    return torch.optim.LBFGS(model.parameters())


def another():
    return torch.optim.SGD(nn.Linear(2, 2).parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, o: {"model": 3}, r"watch takes a torch.nn.Module; got an object of type int"),
        (lambda m, o: {"optimizer": None}, r"or a list of them; got none"),
        (lambda m, o: {"optimizer": 3}, r"watch takes a torch.optim.Optimizer; got an object"),
        (lambda m, o: {"optimizer": another()}, r"the optimizer SGD steps none of the model's"),
        (lambda m, o: {"scaler": 2.0}, r"scaler is to be a torch.amp.GradScaler; got an object"),
        (lambda m, o: {"scheduler": 2}, r"scheduler is to be one of torch.optim.lr_scheduler"),
        (lambda m, o: {"scheduler": torch.optim.lr_scheduler.StepLR(another(), 1)},
         r"the scheduler StepLR drives another optimizer"),
        (lambda m, o: {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(o)},
         r"ReduceLROnPlateau is stepped with a metric"),
        (lambda m, o: {"clip": -1.0}, r"clip is the largest norm of all gradients, .* got -1.0"),
        (lambda m, o: {"clip": NAN}, r"clip is the largest norm"),
        (lambda m, o: {"accumulate": 0}, r"accumulate is the number of micro-batches .* got 0"),
        (lambda m, o: {"accumulate": True}, r"accumulate .* got True"),
        (lambda m, o: {"policy": "skp"}, r"policy is 'skip' or 'raise'; got 'skp'; did you mean"),
        (lambda m, o: {"stop_after": 0}, r"stop_after is a number of steps in a row, .* got 0"),
        (lambda m, o: {"measure_every": -1}, r"measure_every is a number of steps, 0 for never"),
        (lambda m, o: {"budget": "long"}, r"budget is the seconds"),
        (lambda m, o: {"variants": ["fp65"]}, r"no precision is called 'fp65'; did you mean fp64"),
        (lambda m, o: {"variants": "fp64"}, r"variants are names, as in \['fp64'\]"),
        (lambda m, o: {"log": 3}, r"log is the name of a CSV file, something with add"),
        (lambda m, o: {"subject": 3}, r"subject names a factory"),
        (lambda m, o: {"groups": 3}, r"groups maps names to prefixes"),
        (lambda m, o: {"optimizer": [lbfgs(m), o]}, r"LBFGS, steps alone; got 2 optimizers"),
        (lambda m, o: {"optimizer": lbfgs(m), "accumulate": 2}, r"accumulate=2 means nothing to"),
        (lambda m, o: {"optimizer": lbfgs(m), "scaler": torch.amp.GradScaler("cpu")},
         r"a GradScaler supports no optimizer that needs a closure"),
    ],
)  # fmt: skip
def test_arguments_that_mean_nothing(change, message):
    """One sentence, that says what would work."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters())
    arguments = {"model": model, "optimizer": optimizer} | change(model, optimizer)
    with pytest.raises(UsageError, match=message) as caught:
        nanhunt.watch(arguments.pop("model"), arguments.pop("optimizer"), **arguments)
    assert "\n" not in str(caught.value)


# -- what is told of a step ------------------------------------------------------------------


def test_figures():
    """Of each decision, with no NaN among them; a log gets them as they come."""
    logged = []
    model, optimizer, watch, _ = started(log=logged.append, clip=0.05, measure_every=2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    watch = nanhunt.watch(
        model, optimizer, log=logged.append, clip=0.05, measure_every=2, budget=0,
        scheduler=scheduler, groups={"ends": ["body", "head"]}, on_report=lambda _: None,
    )  # fmt: skip
    for x in (GOOD, POOR, GOOD):
        watch.step(lambda: loss_of(model, x))
    assert tuple(logged) == watch.figures
    first, second, third = logged
    assert (first.step, first.stepped, first.scheduled, first.rates) == (0, True, True, (0.01,))
    assert 0.0 < first.clipped < 1.0
    assert [name for name, _ in first.norms] == ["ends", "norm"]
    assert dict(first.updates)["ends"] > 1e-4
    assert 0.0 < first.inside < first.seconds
    assert (second.why, second.nonfinite, second.scheduled) == ("nonfinite", 1, False)
    assert dict(second.norms)["ends"] is None
    assert second.updates == ()
    assert (third.rates, bool(third.updates)) == ((0.005,), True)


def test_sanitised_gradients_are_noted():
    """A hook that cleans them is seen in the replay."""
    model, _, watch, _ = started()
    model.body.weight.register_hook(torch.nan_to_num)
    outcome = watch.step(lambda: loss_of(model, GOOD) * NAN)
    assert outcome.notes[0] == "gradients sanitised before the check"
    assert watch.figures[0].notes == outcome.notes


def test_a_validation_loss():
    """It is noted with the last step, and counted where it is not finite."""
    model, _, watch, _ = started()
    watch.note_validation(1.0)
    watch.step(lambda: loss_of(model, GOOD))
    watch.note_validation(torch.tensor(2.0))
    assert (watch.figures[0].validated, watch.figures[0].validation) == (True, 2.0)
    watch.note_validation(NAN)
    assert (watch.figures[0].validated, watch.figures[0].validation) == (True, None)


def test_a_log_that_raises_never_hurts():
    """One warning, then silence."""

    def log(_figures):
        raise OSError("disk full")

    model, _, watch, _ = started(log=log)
    with pytest.warns(RuntimeWarning, match=r"the log raised OSError: disk full; it is not called"):
        assert watch.step(lambda: loss_of(model, GOOD)).stepped
    assert watch.step(lambda: loss_of(model, GOOD)).stepped


def test_parameters_that_are_added_later():
    """A group that joins the optimizer is checked and stepped from then on."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    watch = nanhunt.watch(model, optimizer)
    assert list(watch.step(lambda: model(GOOD).square().mean()).norms) == ["head"]
    optimizer.add_param_group({"params": list(model.body.parameters())})
    assert list(watch.step(lambda: model(GOOD).square().mean()).norms) == ["body", "head"]


def test_ranks_agree():
    """Another process's reason to skip is one here; nothing is hunted for it."""
    answers = iter([1.0, 0.0])
    asked = []

    def agree(mine):
        asked.append(float(mine))
        return mine + next(answers)

    model, _, watch, told = started(agree=agree)
    before = [p.detach().clone() for p in model.parameters()]
    assert watch.step(lambda: loss_of(model, GOOD)).why == "ranks"
    assert same(before, list(model.parameters()))
    assert watch.step(lambda: loss_of(model, GOOD)).stepped
    assert (asked, told) == ([0.0, 0.0], [])


def test_making_a_watch_draws_no_random_number():
    """Nor does the printing of a report, in a process in which everything is imported anew."""
    code = """
import random, torch, nanhunt
from torch import nn
model = nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
before = random.getstate()
watch = nanhunt.watch(model, optimizer, budget=0)
watch.step(lambda: model(torch.ones(1, 2)).sum())
watch.step(lambda: (model.weight * 0).sqrt().sum())
print(random.getstate() == before)
"""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ran.stdout == "True\n"
    assert "CULPRIT" in ran.stderr


# -- capsules --------------------------------------------------------------------------------


def test_a_capsule_holds_the_state_before_the_step(tmp_path):
    """Written once for each culprit, from parameters, buffers and generators as they were."""
    model, _, watch, _ = started(rate=0.3, capsules=tmp_path, subject="pkg.mod:factory")
    watch.step(lambda: loss_of(model, GOOD))
    before = {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
    drawn = read_generators()
    outcome = watch.step(lambda: loss_of(model, POOR), batch=POOR)
    capsule = read_capsule(outcome.capsule)
    assert set(capsule.model) == set(before)
    assert all(torch.equal(capsule.model[name], before[name]) for name in before)
    assert torch.equal(capsule.generators.cpu, drawn.cpu)
    assert torch.equal(capsule.batch, POOR)
    assert (capsule.step, capsule.subject) == (1, "pkg.mod:factory")
    assert capsule.loss == outcome.loss
    assert "aten::sqrt at " in capsule.note
    watch.step(lambda: loss_of(model, POOR), batch=POOR)
    assert list(tmp_path.glob("*.capsule")) == [outcome.capsule]


def test_a_capsule_that_cannot_be_written(tmp_path, monkeypatch):
    """One warning, and the training goes on."""

    def refuse(*_args, **_kwargs):
        raise OSError("no space left")

    model, _, watch, told = started(capsules=tmp_path)
    monkeypatch.setattr(keeping, "capture", refuse)
    with pytest.warns(RuntimeWarning, match="step 0 could not be kept: OSError: no space left"):
        assert watch.step(lambda: loss_of(model, POOR)).capsule is None
    assert len(told) == 1
    assert watch.step(lambda: loss_of(model, GOOD)).stepped


def test_a_capsule_replays_to_the_same_bits(tmp_path):
    """Loss and gradients of the original, in a model that was built anew."""
    _, _, watch, _ = started(rate=0.3, capsules=tmp_path)
    model = watch._choices.model
    outcome = watch.step(lambda: loss_of(model, POOR), batch=POOR)
    capsule = read_capsule(outcome.capsule)
    fresh, *_ = started(rate=0.3)
    subject = open_capsule(capsule, Subject(fresh, [POOR], loss_of))
    assert replay(subject, subject.batch(0), scope=None).fingerprint == capsule.fingerprint != ""


def test_health_is_a_frame():
    """With a row for each step."""
    model, _, watch, _ = started()
    for batch in (GOOD, POOR, GOOD):
        watch.step(lambda batch=batch: loss_of(model, batch))
    assert watch.health()["stepped"].tolist() == [True, False, True]


# -- the stations ----------------------------------------------------------------------------


def by_hand(watch, model, optimizer, x, scaler=None):
    """A step as a framework takes it."""
    optimizer.zero_grad()
    watch.before_step(lambda: loss_of(model, x), batch=x)
    loss = loss_of(model, x)
    (loss if scaler is None else scaler.scale(loss)).backward()
    told = watch.after_backward(loss, is_unscaled=scaler is None)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    return told, watch.after_step()


def test_stations():
    """A framework's own step is withheld by taking its gradients away."""
    model, optimizer, watch, told = started()
    seen, done = by_hand(watch, model, optimizer, GOOD)
    assert (seen.why, seen.stepped, done.stepped) == ("", False, True)
    before = [p.detach().clone() for p in model.parameters()]
    seen, done = by_hand(watch, model, optimizer, POOR)
    assert (seen.why, done.why, done.stepped) == ("nonfinite", "nonfinite", False)
    assert same(before, list(model.parameters()))
    assert told[0].culprits[0].line == line_of("the root")
    assert [f.why for f in watch.figures] == ["", "nonfinite"]


def test_stations_with_a_scaler():
    """The framework's scaler skips, also where only the loss is not finite."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model, optimizer, watch, told = started(scaler=scaler)
    seen, _ = by_hand(watch, model, optimizer, GOOD, scaler)
    assert seen.norm == pytest.approx(seen.norm)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        seen, done = by_hand(watch, model, optimizer, POOR, scaler)
        assert not done.stepped
    assert (seen.why, scaler.get_scale()) == ("nonfinite", 0.5)
    assert same(before, list(model.parameters()))
    assert len(told) == 1
    watch.before_step()
    loss = model(GOOD).mean() + torch.tensor(INF)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    assert "no closure was given" in watch.after_backward(loss).report.headline
    scaler.step(optimizer)
    scaler.update()
    assert watch.after_step().why == "loss"
    assert same(before, list(model.parameters()))


def test_stations_out_of_order():
    """One sentence each; a step that raised is undone by who saw it."""
    model, optimizer, watch, _ = started()
    with pytest.raises(UsageError, match="after_backward comes after before_step"):
        watch.after_backward(torch.tensor(1.0))
    with pytest.raises(UsageError, match="after_step comes after after_backward"):
        watch.after_step()
    before = bits(model, optimizer)
    watch.before_step()
    loss_of(model, GOOD).backward()
    watch.undo_step()
    assert same(before, bits(model, optimizer))
    assert by_hand(watch, model, optimizer, GOOD)[1].stepped


# -- long runs -------------------------------------------------------------------------------


def test_buffers_that_change_their_identity():
    """A module that replaces or resizes its buffers is put back all the same."""
    module = nn.Module()
    module.register_buffer("a", torch.zeros(3))
    module.register_buffer("b", torch.zeros(2, 1).expand(2, 4))
    taken = moment.Moment(moment.tables_of([module])).take()
    home = module.a
    module.a = torch.ones(5)
    taken.restore()
    assert module.a is home
    home.resize_(7).fill_(1.0)
    taken.restore()
    assert torch.equal(module.a, torch.zeros(3))
    module.a.resize_(4)
    module.a.fill_(2.0)
    taken.take()
    module.a.fill_(3.0)
    taken.restore()
    assert torch.equal(module.a, torch.full((4,), 2.0))


def resident():
    """Resident memory, MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_soak():
    """1,000 steps with a fault in each hundredth: memory flat, nothing left behind.

    With NANHUNT_SOAK in the environment 20,000, with one in each five hundredth.
    """
    count, every = (20_000, 500) if os.environ.get("NANHUNT_SOAK") else (1_000, 100)
    model, _, watch, told = started(rate=0.1, stop_after=None, keep_previous=True)
    clean, sizes, tensors = traces(), [], []
    for step in range(1, count + 1):
        x = POOR if step % every == 0 else GOOD
        outcome = watch.step(lambda: loss_of(model, x), batch=x)
        assert outcome.stepped == (x is GOOD)
        if step % (count // 10) == 0:
            gc.collect()
            sizes.append(resident())
            tensors.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
            assert traces() == clean
    assert len(told) == 1
    assert max(tensors[2:]) <= tensors[1] + 5
    assert sizes[-1] - sizes[2] < 30.0
    assert sum(f.stepped for f in watch.figures) <= count - count // every


def test_the_incident():
    """Trained under watch, the bundled case skips its steps and names the line of eigh."""
    from nanhunt.loading import load

    found = load("ris:incident", options={"preset": "tiny"}).subject
    told = []
    watch = nanhunt.watch(
        found.model, found.optimizer, clip=1.0, budget=0, on_report=told.append,
        groups=found.groups, policy="skip",
    )  # fmt: skip
    before = [p.detach().clone() for p in found.model.parameters()]
    for index in range(2):
        batch = found.batch(index)
        outcome = watch.step(lambda: found.call_loss(batch), batch=batch)
        assert (outcome.stepped, outcome.why) == (False, "nonfinite")
    assert same(before, list(found.model.parameters()))
    (report,) = told
    culprit = report.culprits[0]
    assert culprit.op == "aten::_linalg_eigh"
    assert culprit.cause == "degenerate_decomposition"
    source = Path(inspect.getfile(sys.modules["ris_model.losses.incident"]))
    line = source.read_text(encoding="utf-8").splitlines()[culprit.line - 1]
    assert "torch.linalg.eigh" in line
    assert culprit.terms == ("align",)
