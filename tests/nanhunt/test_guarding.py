"""detect: what it raises and where, what it lets pass, and that nothing of it stays."""

import contextlib
import inspect
import math
import pickle
import threading
import traceback

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import optimizer as optimizers
from torch.utils.checkpoint import checkpoint

import nanhunt
from nanhunt.errors import NonFiniteError, UsageError
from nanhunt.guarding import observer
from nanhunt.guarding.wires import WIRES
from nanhunt.recorder.mode import Recorder
from nanhunt.report import renderer
from nanhunt.report.short import tell

INF, NAN = math.inf, math.nan
BORN = {"stop": "birth"}


def leaf(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def line_of(text):
    """The line of this file that ends in a mark."""
    lines = inspect.getsource(inspect.getmodule(line_of)).splitlines()
    return next(n for n, line in enumerate(lines, 1) if line.endswith(f"# {text}"))


class Net(nn.Module):
    """Two layers, and between them what a test plants."""

    def __init__(self, between=None):
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.between = between or (lambda h: h)

    def forward(self, x):
        return self.head(self.between(self.body(x))).mean()


@contextlib.contextmanager
def caught():
    """The error of a block that must raise; filled when it is over."""
    box = []
    with pytest.raises(NonFiniteError) as info:
        yield box
    box.append(info.value)


def culprit(error):
    """Op and line of what was found."""
    first = error.report.culprits[0]
    return first.op, first.line


def raised_at(error):
    """The line at whose call the traceback ends: where a debugger would stand."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    assert last.filename == __file__
    return last.lineno


def wired():
    """What a block puts into torch."""
    module = nn.modules.module
    return [
        *(dict(hooks) for hooks in (
            optimizers._global_optimizer_pre_hooks,
            optimizers._global_optimizer_post_hooks,
            module._global_forward_pre_hooks,
            module._global_forward_hooks,
        )),
        torch.autograd._engine_run_backward,
        *(vars(torch.amp.GradScaler)[name] for name in ("scale", "step", "update")),
        torch.utils._python_dispatch._get_current_dispatch_mode_stack(),
        WIRES.own,
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_stays():
    """Whatever a test does, torch is afterwards as it was."""
    before = wired()
    yield
    assert wired() == before


# -- the loss --------------------------------------------------------------------------------------


def test_a_loss_is_judged_before_its_backward():
    """The gradients are not touched, and the message is the report."""
    x = leaf(1.0, -1.0)
    with caught() as box, nanhunt.detect():
        loss = x.log().sum()  # log of -1
        loss.backward()  # backward of NaN
    assert x.grad is None
    assert culprit(box[0]) == ("aten::log", line_of("log of -1"))
    assert raised_at(box[0]) == line_of("backward of NaN")
    told = str(box[0]).splitlines()
    assert told[0] == "the loss is nan"
    assert any("test_guarding.py" in line and f":{line_of('log of -1')} " in line for line in told)
    assert "              loss = x.log().sum()  # log of -1" in told
    cause = box[0].report.culprits[0].cause
    assert f"  cause     {cause} · nanhunt explain {cause}" in told
    assert 6 <= len(told) <= 14


def test_a_healthy_loss_passes_in_silence():
    """Its twin."""
    x = leaf(1.0, 2.0)
    with nanhunt.detect():
        x.log().sum().backward()
    assert x.grad is not None


def test_a_loss_that_is_never_differentiated_is_no_sink():
    """A metric may be NaN."""
    with nanhunt.detect():
        assert leaf(-1.0).log().sum().isnan()


def test_several_roots_are_judged_each():
    """As `torch.autograd.backward` takes them."""
    with caught() as box, nanhunt.detect():
        torch.autograd.backward([leaf(1.0).sum(), leaf(-1.0).sqrt().sum()])
    assert box[0].report.culprits[0].op == "aten::sqrt"


def test_a_root_that_is_no_number_is_no_loss():
    """Masked entries of an output whose incoming gradient is given."""
    x = leaf(1.0, 2.0)
    with nanhunt.detect():
        y = x.masked_fill(torch.tensor([True, False]), -INF)
        y.backward(torch.tensor([0.0, 1.0]))
    assert x.grad.tolist() == [0.0, 1.0]


# -- gradients -------------------------------------------------------------------------------------


def test_an_infinite_gradient_is_found():
    """The slope of sqrt at 0; `detect_anomaly` is silent about infinities."""
    x = leaf(0.0, 4.0)
    with caught() as box, nanhunt.detect():
        loss = x.sqrt().sum()  # root
        loss.backward()  # its backward
    assert culprit(box[0]) == ("aten::sqrt", line_of("root"))
    assert raised_at(box[0]) == line_of("its backward")
    assert box[0].report.headline == "the loss is finite (2); 1 of 1 gradients are not"
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        leaf(0.0, 4.0).sqrt().sum().backward()


def test_parameters_are_called_by_their_modules():
    """Without a model the outermost class stands before the path."""
    model = Net(lambda h: (h * 0).sqrt())
    with caught() as box, nanhunt.detect():
        model(torch.ones(2, 4)).backward()
    first = box[0].report.culprits[0]
    assert (first.module, first.poisoned) == ("Net", (("Net", 2, 2),))
    assert box[0].report.headline.endswith("2 of 4 gradients are not")
    assert [step.module for step in first.path][-1] == "Net.body"


def test_with_a_model_paths_are_its_own():
    """As everywhere else in nanhunt."""
    model = Net(lambda h: (h * 0).sqrt())
    with caught() as box, nanhunt.detect(model):
        model(torch.ones(2, 4)).backward()
    first = box[0].report.culprits[0]
    assert (first.module, [step.module for step in first.path][-1]) == ("Net", "body")


def test_two_models_of_a_class_are_told_apart():
    """A pair of critics, say."""
    one, two = Net(), Net(lambda h: (h * 0).sqrt())
    with caught() as box, nanhunt.detect():
        one(torch.ones(2, 4)).backward()
        two(torch.ones(2, 4)).backward()
    assert box[0].report.culprits[0].module == "Net 2"


def test_a_parameter_that_was_bad_before_is_named():
    """It is no op's fault."""
    model = Net()
    with torch.no_grad():
        model.head.weight[0, 3] = NAN
    with caught() as box, nanhunt.detect(model):
        model(torch.ones(2, 4)).backward()
    assert box[0].report.culprits[0].where == "param:head.weight"


def test_a_gradient_penalty_is_no_sink_until_it_reaches_a_loss():
    """autograd.grad returns; only a loss that is made of it counts."""
    x = leaf(0.0, 4.0)
    with nanhunt.detect():
        (slope,) = torch.autograd.grad(x.sqrt().sum(), x, create_graph=True)  # penalised
        assert slope.isinf().any()
        slope[1:].square().sum().detach()
    with caught() as box, nanhunt.detect():
        (slope,) = torch.autograd.grad(x.sqrt().sum(), x, create_graph=True)  # penalised, too
        slope.square().sum().backward()
    assert culprit(box[0]) == ("aten::sqrt", line_of("penalised, too"))


def test_a_healthy_gradient_penalty_passes():
    """Its twin, with a second backward through the first."""
    x = leaf(1.0, 4.0)
    with nanhunt.detect():
        (slope,) = torch.autograd.grad(x.sqrt().sum(), x, create_graph=True)
        (x.sqrt().sum() + slope.square().sum()).backward()
    assert x.grad.isfinite().all()


def test_inputs_narrow_the_leaves():
    """Only what gets a gradient is looked at."""
    bad, good = leaf(0.0), leaf(1.0)
    with nanhunt.detect():
        (bad.sqrt() + good).sum().backward(inputs=[good])
    assert bad.grad is None
    with caught(), nanhunt.detect():
        (bad.sqrt() + good).sum().backward(inputs=[bad])


@pytest.mark.parametrize("reentrant", [True, False])
def test_leaves_inside_a_checkpoint_are_looked_at(reentrant):
    """A reentrant one is hidden from the graph of the loss."""
    model = Net(lambda h: (h * 0).sqrt())
    x = torch.ones(2, 4, requires_grad=True)
    with caught() as box, nanhunt.detect():
        checkpoint(model, x, use_reentrant=reentrant).backward()
    assert box[0].report.culprits[0].op == "aten::sqrt"
    assert "of 5 gradients" in box[0].report.headline


# -- what is harmless ------------------------------------------------------------------------------


def test_masks_and_branches_not_taken_pass():
    """Infinities that were asked for, and a NaN that reaches nothing."""
    x = leaf(1.0, 2.0, 3.0)
    with nanhunt.detect():
        scores = x.masked_fill(torch.tensor([False, False, True]), -INF)
        harmless = (x.detach() - 5.0).log()
        assert harmless.isnan().all()
        best = torch.tensor(INF)
        best = torch.minimum(best, x.detach().min())
        (scores.softmax(0).max() + torch.where(x.detach() > 0, 0.0, harmless).sum()).backward()
    assert x.grad.isfinite().all()


# -- gradient scalers ------------------------------------------------------------------------------


class Overflowing(torch.autograd.Function):
    """Passes on, and overflows in the backward from a limit on, as float16 does."""

    @staticmethod
    def forward(ctx, x, limit):
        ctx.limit = limit
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return (gradient * 1e38 * 1e3 if gradient.abs().max() > ctx.limit else gradient), None


def scaled_steps(model, scaler, steps, loss_of):
    """A loop with a scaler; the scale before every step."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    scales = []
    for _ in range(steps):
        scales.append(scaler.get_scale())
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        scaler.step(optimizer)
        scaler.update()
    return scales


def overflow_at(limit):
    return lambda model: Overflowing.apply(model(torch.ones(2, 4)), limit)


def test_a_step_that_the_scaler_skips_is_healthy():
    """The scale is halved until the gradients fit."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    with nanhunt.detect():
        scales = scaled_steps(Net(), scaler, 5, overflow_at(1000.0))
    assert scales == [4096.0, 2048.0, 1024.0, 512.0, 512.0]


def test_a_step_that_no_scale_fits_is_found():
    """Once the scale is 1 it is no remedy any more."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with caught() as box, nanhunt.detect():
        scaled_steps(Net(), scaler, 9, overflow_at(0.0))
    assert scaler.get_scale() == 1.0
    assert "gradients are not at loss scale 1," in box[0].report.headline
    assert box[0].report.culprits[0].op == "custom:Overflowing"


def test_a_nan_loss_under_a_scaler_is_found_at_once():
    """No scale makes a NaN finite; nor an infinity that was there before it was scaled."""
    for value in (-1.0, 0.0):
        scaler = torch.amp.GradScaler("cpu")
        with caught() as box, nanhunt.detect():
            scaler.scale(leaf(value).log().sum()).backward()
        assert box[0].report.culprits[0].op == "aten::log"
        assert str(box[0]).startswith(f"the loss is {'nan' if value else '-inf'}")


def test_a_disabled_scaler_judges_nothing():
    """Its gradients are judged at the end of the backward."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with caught() as box, nanhunt.detect():
        scaler.scale(leaf(0.0).sqrt().sum()).backward()  # unscaled
    assert raised_at(box[0]) == line_of("unscaled")


def test_a_scaler_stepped_outside_of_the_block():
    """At its end the last scale counts."""
    with nanhunt.detect():
        torch.amp.GradScaler("cpu", init_scale=2.0).scale(leaf(0.0).sqrt().sum()).backward()
    with caught(), nanhunt.detect():
        torch.amp.GradScaler("cpu", init_scale=1.0).scale(leaf(0.0).sqrt().sum()).backward()


class OwnScaler(torch.amp.GradScaler):
    """One that overrides, as the sharded one does."""

    def scale(self, outputs):
        return super().scale(outputs)


def test_scalers_that_inherit():
    """They are wrapped too, and left as they were."""
    own = vars(OwnScaler)["scale"]
    with nanhunt.detect():
        scaled_steps(Net(), OwnScaler("cpu", init_scale=2048.0), 3, overflow_at(1000.0))
    assert vars(OwnScaler)["scale"] is own


# -- optimizers ------------------------------------------------------------------------------------


def steps_of_adam(eps, **options):
    model = Net(lambda h: h * 0)  # the body gets gradients of 0
    optimizer = torch.optim.Adam(model.parameters(), eps=eps, **options)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).backward()
        optimizer.step()  # step of Adam
    return model


@pytest.mark.parametrize("foreach", [True, False])
def test_a_parameter_after_the_step(foreach):
    """Adam divides 0 by 0 where eps is 0 and a gradient is."""
    with caught() as box, nanhunt.detect():
        steps_of_adam(0.0, foreach=foreach)
    first = box[0].report.culprits[0]
    assert (first.phase, first.line) == ("optimizer", line_of("step of Adam"))
    assert raised_at(box[0]) == line_of("step of Adam")
    assert box[0].report.headline.startswith("after the optimizer step 3 of 4 parameters")


def test_a_healthy_adam_passes():
    """Its twin."""
    with nanhunt.detect():
        model = steps_of_adam(1e-8)
    assert all(p.isfinite().all() for p in model.parameters())


def test_optimizers_of_other_threads_are_not_ours():
    """Their hooks are those of the whole process."""
    parameter = nn.Parameter(torch.tensor([NAN]))
    parameter.grad = torch.zeros(1)
    started, done = threading.Event(), threading.Event()

    def work():
        started.wait(10)
        torch.optim.SGD([parameter], 0.1).step()
        parameter.sum().backward()
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    with nanhunt.detect():
        started.set()
        assert done.wait(10)
    thread.join()


# -- births ----------------------------------------------------------------------------------------


def test_a_birth_in_the_forward_raises_in_its_line():
    """The traceback ends there, so that a debugger stands in it."""
    x = leaf(1.0, 0.0)
    with caught() as box, nanhunt.detect(**BORN):
        masked = x.masked_fill(x > 0.5, -INF)
        assert masked.isinf().any()
        y = 1.0 / x  # quotient
        y.clamp(max=1.0).sum().backward()
    assert raised_at(box[0]) == line_of("quotient")
    assert culprit(box[0])[1] == line_of("quotient")
    headline = "reciprocal returned 1 infinite of 2 elements, in the forward"
    assert str(box[0]).splitlines()[0] == headline


def test_a_birth_in_the_backward_raises_at_its_call():
    """Even where it would reach nothing; the frames of torch are cut off."""
    x = leaf(0.0, 4.0)
    with caught() as box, nanhunt.detect(**BORN):
        y = x.sqrt()  # its slope
        y.register_hook(lambda g: g.clone())
        (y * 1.0).sum().backward()  # the slope is taken
    assert raised_at(box[0]) == line_of("the slope is taken")
    assert culprit(box[0]) == ("aten::sqrt", line_of("its slope"))
    assert box[0].report.headline == "div returned 1 infinite of 2 elements, in a backward"


def test_without_stop_a_birth_that_reaches_nothing_passes():
    """Its twin."""
    with nanhunt.detect():
        assert (1.0 / leaf(1.0, 0.0)).isinf().any()


def test_births_under_a_live_scale_are_the_scalers():
    """It is for it that they happen."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    with nanhunt.detect(**BORN):
        assert scaled_steps(Net(), scaler, 5, overflow_at(1000.0))[-1] == 512.0


def test_a_birth_in_the_optimizer_raises_in_it_and_leaves_the_stage():
    """A program that goes on is recorded rightly."""
    recorders = []
    with nanhunt.detect(**BORN):
        recorders.append(WIRES.own.recorder)
        with pytest.raises(NonFiniteError) as info:
            steps_of_adam(0.0)
        assert recorders[0].stage == "forward"
    assert info.value.report.culprits[0].phase == "optimizer"


# -- what the user lets pass -----------------------------------------------------------------------


@pytest.mark.parametrize("stop", ["sink", "birth"])
@pytest.mark.parametrize(
    "allow",
    [
        "log", "aten::log", "Net.body", "body", "Net", f"test_guarding.py:{line_of('is planted')}",
        f"{__file__}:{line_of('is planted')}", ["exp", "log"], "module",
    ],
)  # fmt: skip
def test_allowed_births_do_not_count(allow, stop):
    """By op, module (or path) and call site."""
    model = Net()
    model.body.forward = lambda x: (model.head.weight * 0).log()  # is planted
    with nanhunt.detect(stop=stop, allow=model.body if allow == "module" else allow):
        model(torch.ones(2, 4)).backward()


@pytest.mark.parametrize("stop", ["sink", "birth"])
@pytest.mark.parametrize(
    "allow", ["exp", "aten::sqrt", "Net.head", "test_guarding.py:1", "g.py:7", "other", "ea.body"]
)
def test_others_count(allow, stop):
    """Their twins."""
    model = Net()
    model.body.forward = lambda x: (model.head.weight * 0).log()
    with caught(), nanhunt.detect(stop=stop, allow=allow):
        model(torch.ones(2, 4)).backward()
    with caught(), nanhunt.detect(stop=stop, allow=model.head):
        model(torch.ones(2, 4)).backward()


def test_an_allowed_slope():
    """In a backward it is the forward op, its line and module that count."""
    for allow in ("sqrt", f"test_guarding.py:{line_of('let pass')}"):
        with nanhunt.detect(stop="birth", allow=allow):
            leaf(0.0).sqrt().sum().backward()  # let pass
    with caught(), nanhunt.detect(allow="div"):
        leaf(0.0).sqrt().sum().backward()


# -- telling instead of raising --------------------------------------------------------------------


@pytest.mark.parametrize("stop", ["sink", "birth"])
def test_a_function_is_told_and_training_goes_on(stop):
    """Once for each culprit, however far its value comes."""
    told = []
    model = Net(lambda h: (h * 0).sqrt())  # told of
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with nanhunt.detect(on_culprit=told.append, stop=stop):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).backward()
            optimizer.step()
    assert [r.culprits[0].line for r in told] == [line_of("told of")] * len(told)
    assert len({(r.culprits[0].op, r.culprits[0].step) for r in told}) == len(told)
    assert told[0].culprits[0].op == "aten::sqrt"
    assert not model.body.weight.isfinite().any()


def test_a_function_that_computes_is_not_watched():
    """It may look closer, with another hunt even."""
    seen = []

    def closer(report):
        leaf(0.0).log().sum().backward()
        seen.append(report)

    with nanhunt.detect(on_culprit=closer):
        leaf(0.0).sqrt().sum().backward()
    assert len(seen) == 1


def test_an_error_of_the_function_is_the_blocks():
    """So one can raise what one likes."""

    def refuse(report):
        raise LookupError(report.headline)

    with pytest.raises(LookupError, match="gradients"), nanhunt.detect(on_culprit=refuse):
        leaf(0.0).sqrt().sum().backward()


# -- how it is put on, and off ---------------------------------------------------------------------


def test_as_a_decorator():
    """Every call has a recorder of its own; a recursion is one block."""
    recorders = []

    @nanhunt.detect()
    def train(depth, value=4.0):
        """Train."""
        recorders.append(WIRES.own.recorder)
        if depth:
            train(depth - 1)
        leaf(value).sqrt().sum().backward()
        return depth

    assert (train(1), train.__name__, train.__doc__) == (1, "train", "Train.")
    with caught():
        train(0, value=0.0)
    assert recorders[0] is recorders[1] is not recorders[2]


def test_what_cannot_be_decorated():
    """A call that returns before it runs."""

    async def later():
        pass

    def steps():
        yield

    for function in (later, steps):
        with pytest.raises(UsageError, match="runs after its call has returned"):
            nanhunt.detect()(function)


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (r"got function \(a decorator is written @nanhunt.detect\(\)", {"model": lambda: None}),
        ("stop is 'sink' or 'birth'; got 'op'", {"stop": "op"}),
        ("on_culprit takes a function; got str", {"on_culprit": "print"}),
        ("allow takes modules, .*; got int", {"allow": [7]}),
        ("allow takes modules, .*; got int", {"allow": 3}),
        (
            "allow names 'bdoy', which is no op of torch and no module of Net; .* with body, head",
            {"model": Net(), "allow": ["log", "aten::sqrt", "Net.head", "bdoy"]},
        ),
        ("no module of Linear; it has no modules", {"model": nn.Linear(1, 1), "allow": "lgo"}),
    ],
)
def test_arguments_that_mean_nothing(words, arguments):
    """One sentence each."""
    with pytest.raises(UsageError, match=words):
        nanhunt.detect(**arguments)


def test_a_name_that_may_be_known_later_is_taken():
    """Without a model any word may be the path of a module that is called in the block."""
    assert nanhunt.detect(allow="bdoy")
    assert nanhunt.detect(Net(), allow=["custom:Later", "Net", "body", "log_softmax"])


GIVEN = {
    "as_an_argument": lambda y: y.backward(gradient=NOTHING),
    "to_the_function": lambda y: torch.autograd.backward([y * 1, y], [torch.ones(2), NOTHING]),
}
NOTHING = torch.full((2,), NAN)


@pytest.mark.parametrize("name", GIVEN)
def test_a_gradient_that_is_handed_over(name):
    """It is what the backward was given, and no op that it comes through."""
    with caught() as error, nanhunt.detect():
        GIVEN[name](leaf(1.0, 2.0).exp().tanh())
    first = error[0].report.culprits[0]
    assert (first.phase, first.op, first.where) == ("data", "gradient", "the gradient given")
    assert first.cause == "bad_data"
    with nanhunt.detect():
        leaf(1.0, 2.0).exp().backward(gradient=torch.ones(2))


def test_a_gradient_that_was_computed_and_handed_over():
    """The op that computed it is at fault."""
    with caught() as error, nanhunt.detect():
        y = leaf(1.0, 2.0).exp()
        y.backward(gradient=torch.zeros(2).log())
    assert culprit(error[0]) == ("aten::log", inspect.currentframe().f_lineno - 1)


def test_a_gradient_that_was_left_by_an_earlier_backward():
    """What is added to it is finite."""
    net = Net()
    net.head.weight.grad = torch.full_like(net.head.weight, NAN)
    for model in (net, None):
        with caught() as error, nanhunt.detect(model):
            net(torch.ones(2, 4)).backward()
        first = error[0].report.culprits[0]
        assert (first.phase, first.op, first.cause) == ("data", "gradient", "bad_data")
        assert first.where == ("head.weight.grad" if model else "Net.head.weight.grad")
    with nanhunt.detect(net):
        net.zero_grad()
        net(torch.ones(2, 4)).backward()


def test_a_program_that_is_traced():
    """What the recorder asks of the values is no part of the program that `make_fx` writes down."""
    net = Net()
    with caught() as error, nanhunt.detect():
        graph = make_fx(lambda x: x.sin() * 2)(torch.ones(3))
        net(torch.ones(2, 4)).sub(1e9).log().sum().backward()
    assert [node.name for node in graph.graph.nodes] == ["x_1", "sin", "mul", "output"]
    assert error[0].report.culprits[0].op == "aten::log"


def test_a_gradient_that_is_traced():
    """Neither is what it asks of the ops that the engine runs."""

    def gradient(x):
        return torch.autograd.grad(x.exp().mul(x).sum(), x)[0]

    plain = make_fx(gradient)(torch.ones(3, requires_grad=True))
    with nanhunt.detect():
        leaf(1.0).exp().backward()
        traced = make_fx(gradient)(torch.ones(3, requires_grad=True))
        leaf(1.0).exp().backward()
    assert traced.code == plain.code


def test_the_inner_block_counts():
    """And the outer one again after it."""
    told = []
    with nanhunt.detect(on_culprit=told.append):
        with nanhunt.detect(allow="sqrt"):
            leaf(0.0).sqrt().sum().backward()
        with caught(), nanhunt.detect(**BORN):
            leaf(0.0).log()
        leaf(0.0).log()
        leaf(-1.0).log().sum().backward()
    assert [report.culprits[0].op for report in told[:1]] == ["aten::log"]


def test_one_block_entered_twice():
    """An object may be used again, also inside of itself."""
    block = nanhunt.detect()
    with block, block:
        leaf(1.0).sqrt().sum().backward()
    with caught(), block, block:
        leaf(0.0).sqrt().sum().backward()
    with block:
        assert WIRES.own is not None


def test_other_errors_pass_unchanged():
    """With the traceback that they had; the fixture sees that nothing stays."""
    error = ValueError("the user's")
    with pytest.raises(ValueError, match="the user's") as info, nanhunt.detect(**BORN):
        raise error
    assert info.value is error
    with pytest.raises(RuntimeError, match="does not require grad"), nanhunt.detect():
        torch.ones(1).backward()


def test_two_threads_at_once():
    """Each has its block; the first to leave takes nothing from the other."""
    entered, left = threading.Event(), threading.Event()
    errors = []

    def work():
        try:
            with nanhunt.detect():
                entered.set()
                left.wait(10)
                leaf(0.0).sqrt().sum().backward()
        except NonFiniteError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert entered.wait(10)
    with nanhunt.detect():
        leaf(1.0).sqrt().sum().backward()
    left.set()
    thread.join()
    assert errors[0].report.culprits[0].op == "aten::sqrt"


def test_the_error_travels():
    """To the process that waits for a worker, say."""
    with caught() as box, nanhunt.detect():
        leaf(0.0).sqrt().sum().backward()
    again = pickle.loads(pickle.dumps(box[0]))  # noqa: S301 - our own
    assert (str(again), repr(again.report)) == (str(box[0]), repr(box[0].report))


# -- the short report ------------------------------------------------------------------------------


def test_the_short_report_is_plain(any_report):
    """Whatever a report holds: no markup, nothing that a terminal obeys, no long lines."""
    lines = renderer("short")(any_report).plain.splitlines()
    assert all(line.isprintable() and len(line) <= 100 for line in lines)
    assert any_report.headline.split()[0][:5] in lines[0]


def test_a_short_report_without_a_culprit(unexplained_report, healthy_report):
    """It says that it cannot tell."""
    assert "cannot tell" in tell(unexplained_report)
    assert len(tell(healthy_report).splitlines()) == 1


# -- what it must not change -----------------------------------------------------------------------


def training(steps, block):
    """Parameters, losses and the state of the generator after some steps with dropout."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    with block:
        for _ in range(steps):
            x = torch.randn(8, 8)
            optimizer.zero_grad()
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
    return [*losses, *model.state_dict().values(), torch.get_rng_state()]


@pytest.mark.parametrize("options", [{}, BORN, {"model": nn.Linear(1, 1)}])
def test_training_is_the_same_to_the_bit(options):
    """Twenty steps, with and without it."""
    plain = training(20, contextlib.nullcontext())
    watched = training(20, nanhunt.detect(**options))
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_grad_mode_is_left_alone():
    """Inside, and after it."""
    with torch.no_grad(), nanhunt.detect():
        assert not torch.is_grad_enabled()
    with nanhunt.detect():
        assert torch.is_grad_enabled()


def test_compiled_functions_stay_compiled():
    """They run eagerly inside, and need no second compilation afterwards."""
    compilations, runs = [], []

    def backend(graph, _inputs):
        compilations.append(graph)

        def run(*args):
            runs.append(1)
            return graph(*args)

        return run

    doubled = torch.compile(lambda x: (x * 2).sqrt().sum(), backend=backend)
    doubled(leaf(1.0)).backward()
    before = len(runs)
    with nanhunt.detect():
        doubled(leaf(1.0)).backward()
    with caught(), nanhunt.detect():
        doubled(leaf(0.0)).backward()
    assert len(runs) == before
    doubled(leaf(1.0)).backward()
    assert (len(compilations), len(runs)) == (1, before + 1)


# -- a long block ----------------------------------------------------------------------------------


def loop(steps, model, held=None):
    """Events held after every step."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    counts = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4))
        if held is not None:
            held.append(torch.full((2,), -INF))
            torch.maximum(held[0], loss.detach(), out=held[0])
        loss.backward()
        optimizer.step()
        counts.append(WIRES.own.recorder.position)
    return counts


@pytest.mark.parametrize("held", [None, []])
def test_events_do_not_grow_without_end(monkeypatch, held):
    """Of older steps only what a living infinity is from stays."""
    monkeypatch.setattr(observer, "KEPT", 100)
    with nanhunt.detect():
        counts = loop(50, Net(), held)
    assert 100 < max(counts) < 400
    assert max(counts[30:]) <= max(counts[:20]) + (0 if held is None else 64)


def test_evaluation_is_let_go_as_well(monkeypatch):
    """It has neither a backward nor a step."""
    monkeypatch.setattr(observer, "KEPT", 100)
    model = Net()
    with nanhunt.detect(), torch.no_grad():
        for _ in range(50):
            model(torch.ones(2, 4))
        assert WIRES.own.recorder.position < 220


def test_what_was_let_go_is_still_accounted_for(monkeypatch):
    """A NaN that a long past step left is traced to its line."""
    monkeypatch.setattr(observer, "KEPT", 50)
    model = Net()
    with caught() as box, nanhunt.detect():
        kept = (model.head.weight.detach() * 0 - 1).sqrt()  # long past
        loop(10, model)
        assert WIRES.own.recorder.position < 200
        (model(torch.ones(2, 4)) + kept.sum()).backward()
    assert culprit(box[0]) == ("aten::sqrt", line_of("long past"))


def test_a_slope_that_was_let_go_has_its_line(monkeypatch):
    """The forward op behind a backward event is kept with it."""
    monkeypatch.setattr(observer, "KEPT", 50)
    model = Net()
    with caught() as box, nanhunt.detect():
        x = leaf(0.0)
        (slope,) = torch.autograd.grad(x.sqrt().sum(), x)  # long past slope
        loop(10, model)
        (model(torch.ones(2, 4)) + slope.sum()).backward()
    assert culprit(box[0]) == ("aten::sqrt", line_of("long past slope"))


def test_steps_are_counted():
    """The finding and the short report say in which one it happened."""
    model = Net()
    with caught() as box, nanhunt.detect():
        loop(3, model)
        (model(torch.ones(2, 4)) * -1.0).abs().neg().log().backward()
    assert box[0].report.culprits[0].step == 3
    assert "step 3 of the block" in str(box[0])


def test_letting_go_of_nothing():
    """Before anything was recorded."""
    recorder = Recorder()
    with recorder.recording():
        recorder.let_go(0)
        torch.ones(1)
        recorder.let_go(1)
    assert recorder.position == 0


@pytest.mark.parametrize(
    ("spoil", "op"),
    [
        (lambda z: z * NAN, "aten::mul"),
        (lambda z: z + torch.full_like(z, NAN), "aten::full_like"),
        (lambda z: torch.where(z > 0, z, NAN), "aten::scalar_tensor"),
        (lambda z: z.clone().fill_(NAN), "aten::fill_"),
    ],
)
def test_who_writes_a_nan_down_makes_it(spoil, op):
    """Nobody asks for one, as for an infinity; one that reaches nothing is let pass."""
    x = leaf(-1.0, 2.0)
    with nanhunt.detect():
        (spoil(x).detach().nan_to_num() + x).sum().backward()
    with pytest.raises(NonFiniteError) as caught, nanhunt.detect():
        spoil(leaf(-1.0, 2.0)).sum().backward()
    found = caught.value.report.culprits[0]
    assert (found.op, found.phase) == (op, "forward")
    assert found.cause != "inf_minus_inf_or_zero_times_inf"
