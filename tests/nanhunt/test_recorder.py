"""Recorder: what it sees of a step, where values are born, and that nothing of it stays."""

import _thread
import contextlib
import inspect
import math
import random
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from nanhunt.recorder import Recorder, Scope
from nanhunt.recorder.flow import Flow
from nanhunt.records import Sink, TensorFacts

INF, NAN = math.inf, math.nan


def record(step, model=None):
    """The events of a forward, a backward if the step returns a loss, and both together."""
    recorder = Recorder(scope=Scope(shapes=True))
    with recorder.recording(model):
        loss = step()
        if isinstance(loss, torch.Tensor) and loss.requires_grad:
            recorder.stage = "backward"
            loss.backward()
    return recorder.events()


def births(events):
    return [event.op for event in events if event.birth is not None]


def only(events, op):
    return next(event for event in events if event.op == op)


def leaf(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def line_of(text):
    """The line of this file that ends in a mark."""
    lines = inspect.getsource(inspect.getmodule(line_of)).splitlines()
    return next(n for n, line in enumerate(lines, 1) if line.endswith(f"# {text}"))


# -- what is seen ----------------------------------------------------------------------------------


def test_forward_and_backward_ops_with_shapes_and_dtypes():
    """Every op of the forward, and every op inside each node's formula."""
    x = leaf(1.0, 4.0)
    events = record(lambda: x.sqrt().sum())
    forward = [e.op for e in events if e.phase == "forward"]
    assert forward == ["aten::sqrt", "aten::detach", "aten::sum"]
    formula = [e.op for e in events if e.node == "SqrtBackward0"]
    assert formula == ["aten::detach", "aten::mul", "aten::div"]
    facts = TensorFacts((2,), "float32")
    assert (events[0].inputs, events[0].outputs) == ((facts,), (facts,))
    assert events[2].outputs == (TensorFacts((), "float32"),)
    assert events[0].made == only(events, "aten::div").number
    assert [e.index for e in events] == list(range(len(events)))
    assert all(e.is_finite and e.birth is None and e.sources == () for e in events)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_optimizer_step_is_recorded(kind, foreach):
    """The arguments that an op writes to are its outputs, in lists too."""
    x = leaf(1.0, 2.0)
    x.grad = torch.ones(2)
    optimizer = kind([x], lr=0.1, foreach=foreach)
    recorder = Recorder(scope=Scope(shapes=True))
    recorder.stage = "optimizer"
    with recorder.recording():
        optimizer.step()
    events = recorder.events()
    writes = [e for e in events if e.op.endswith("_")]
    assert {e.phase for e in events} == {"optimizer"}
    assert any(e.op.startswith("aten::_foreach") for e in writes) == foreach
    assert all(e.outputs for e in writes)
    assert writes[-1].outputs == (TensorFacts((2,), "float32"),)


def test_mutated_arguments_are_outputs():
    """In-place, `out=` and `_foreach_` forms."""
    x, y, out = torch.ones(2), torch.tensor([-1.0, 1.0]), torch.empty(2)

    def step():
        torch.add(x, y, out=out)
        x.add_(y)
        torch._foreach_sqrt_([y, x])

    events = record(step)
    assert [e.outputs for e in events] == [
        (TensorFacts((2,), "float32"),),
        (TensorFacts((2,), "float32"),),
        (TensorFacts((2,), "float32", nan=1), TensorFacts((2,), "float32")),
    ]
    assert births(events) == ["aten::_foreach_sqrt_"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return self.linear(x).relu()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.exp()


def test_module_paths():
    """Each op stands under the innermost module of the model that was running."""
    model = Net()
    outside = nn.SmoothL1Loss()
    x = torch.ones(1, 2)
    events = record(lambda: outside(model(x), x), model)
    assert [e.module for e in events if e.op == "aten::addmm"] == [
        "blocks.0.linear",
        "blocks.1.linear",
    ]
    assert [e.module for e in events if e.op == "aten::relu"] == ["blocks.0", "blocks.1"]
    assert only(events, "aten::exp").module == "(model)"
    assert only(events, "aten::smooth_l1_loss").module == ""


def test_module_path_survives_a_module_that_raises():
    """An error caught inside the forward leaves no module behind."""

    class Fragile(nn.Module):
        def forward(self, x):
            raise ValueError

    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.fragile = Fragile()

        def forward(self, x):
            try:
                return self.fragile(x)
            except ValueError:
                return x.exp()

    model = Careful()
    x = torch.ones(2)
    events = record(lambda: model(x), model)
    assert [(e.op, e.module) for e in events] == [("aten::exp", "(model)")]


# -- the user's line -------------------------------------------------------------------------------


def scaled_log(x):
    return (2 * x.log()).exp()  # helper


def spanning(x, y):
    return torch.addcmul(  # first line of the call
        x,
        y,
        y,
    ).sum()


def test_line_is_the_innermost_of_the_user():
    """A helper's own line; the first line of a call that spans several; not torch's own code."""
    x = leaf(1.0, 2.0)
    layer = nn.LayerNorm(2)

    def step():
        y = scaled_log(x)
        z = spanning(x, x)
        return layer(y).sum() + z  # through a module of torch

    events = record(step)
    lines = {e.op: e.frame.line for e in events if e.phase == "forward"}
    assert lines["aten::log"] == line_of("helper")
    assert lines["aten::addcmul"] == line_of("first line of the call")
    assert lines["aten::native_layer_norm"] == line_of("through a module of torch")
    assert only(events, "aten::log").frame.function == "scaled_log"
    assert only(events, "aten::log").frame.file == __file__


def doubled(x):
    return x.tanh() * 2  # activation of the user


def test_modules_of_torch_have_the_line_that_called_them_each_time():
    """Several ops of a call, the same module from two lines, a call in which the user acts."""
    stack = nn.Sequential(
        nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.GELU()), nn.Linear(2, 2)
    )
    layer = nn.TransformerEncoderLayer(2, 1, 2, activation=doubled, batch_first=True)
    x = torch.ones(1, 2, 2)

    def step():
        stack(x)  # first call
        stack(x)  # second call
        layer(x)  # call of the layer
        stack[0](x).exp()  # call of a part

    events = [e for e in record(step, stack) if e.op != "aten::detach"]
    one = 3 * ["aten::t", "aten::addmm"]
    ops = [e.op for e in events if e.frame.line == line_of("first call")]
    assert [op for op in ops if op in one] == one
    assert [e.op for e in events if e.frame.line == line_of("second call")] == ops
    inside = [e.op for e in events if e.frame.line == line_of("activation of the user")]
    assert inside == ["aten::tanh", "aten::mul"]
    after = [e.op for e in events if e.frame.line == line_of("call of the layer")]
    assert "aten::native_layer_norm" in after[after.index("aten::addmm") + 1 :]
    assert events[-1].op == "aten::exp"
    assert events[-1].frame.line == line_of("call of a part")


def test_memory_that_was_given_back_is_asked_about_no_longer(monkeypatch):
    """A mask that has served does not slow down the rest of a step; one that lives is followed."""
    asked = []
    measure = Flow.measure_inputs

    def counted(flow, *args):
        asked.append(1)
        return measure(flow, *args)

    monkeypatch.setattr(Flow, "measure_inputs", counted)
    x, mask = torch.zeros(4), torch.tensor([True, False, False, False])

    recorder = Recorder()
    with recorder.recording():
        y = x.masked_fill(mask, -INF).softmax(-1)
        for _ in range(40):
            y.mul(1.0)
        assert 0 < len(asked) < 5
        alive = x.masked_fill(mask, -INF)
        for _ in range(40):
            x.mul(1.0)
        alive.mul(1.0)
    assert len(asked) > 40
    *_, masked = (e.index for e in recorder.events() if e.op == "aten::masked_fill")
    assert recorder.events()[-1].sources[0] == (masked,)


def test_what_is_screened_may_be_resized():
    """A look at the values leaves nothing behind on their memory."""
    x = torch.ones(4)
    with Recorder().recording():
        y = (x * 2).add_(1)
    assert x.resize_(8).numel() == 8
    y.untyped_storage().resize_(0)
    assert y.untyped_storage().nbytes() == 0


def test_ops_of_a_node_have_no_line_but_hooks_do():
    """A node of torch is looked up by its number; a user's hook is Python with a line."""
    x = leaf(1.0, 2.0)

    def step():
        y = x.exp()
        y.register_hook(lambda grad: grad.tanh())  # hook
        return y.sum()

    events = record(step)
    assert only(events, "aten::tanh").frame.line == line_of("hook")
    assert all(e.frame is None for e in events if e.phase == "backward" and e.op == "aten::mul")


def test_a_thread_of_the_engine_has_no_line_at_all():
    """A backward on a device runs in a thread in which no Python function called anything."""
    recorder, x, born = Recorder(), torch.ones(2), threading.Event()
    recorder.on_birth = lambda _index: born.set()
    call = (torch.ops.aten.div.Tensor, (), (x, x * 0), {})
    with recorder.recording():
        _thread.start_new_thread(recorder.__torch_dispatch__, call)
        assert born.wait(10)
    (event,) = recorder.events()
    assert (event.op, event.phase, event.frame) == ("aten::div", "backward", None)
    assert event.birth.kind == "inf"


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.pow(3)  # inside the function

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x.square()  # backward of the function


def test_custom_function_has_both_lines():
    """The line inside the function, the line that applied it, and the line of its backward."""
    x = leaf(1.0, 2.0)
    events = record(lambda: Cube.apply(x).sum())  # applied
    forward = only(events, "aten::pow")
    assert forward.frame.line == line_of("inside the function")
    assert forward.caller.line == line_of("applied")
    backward = only(events, "aten::square" if "aten::square" in births(events) else "aten::mul")
    assert (backward.node, backward.phase) == ("CubeBackward", "backward")
    assert backward.frame.line == line_of("backward of the function")
    assert backward.number == forward.made


def test_a_backward_inside_the_forward_is_a_backward():
    """A penalty on a gradient: the inner formula's ops stand under their node."""
    x = leaf(1.0, 2.0)

    def step():
        (grad,) = torch.autograd.grad(x.exp().sum(), x, create_graph=True)
        return grad.sum()

    inner = [e for e in record(step) if e.node == "ExpBackward0"]
    assert {e.phase for e in inner} == {"backward"}
    assert only(inner, "aten::mul").made > inner[0].number
    plain = [e for e in record(lambda: x.exp().sum()) if e.node == "ExpBackward0"]
    assert {e.made for e in plain} == {None}


# -- births and what is passed on ------------------------------------------------------------------


def test_birth_and_its_evidence():
    """Count, kind, place and operands of the elements that an op made."""
    x, y = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([1.0, 0.0])
    (event,) = record(lambda: x / y)
    birth = event.birth
    assert (birth.count, birth.kind, birth.samples) == (2, "nan", 2)
    assert birth.indices == ((0, 1), (1, 1))
    assert [(o.role, o.at_zero) for o in birth.operands] == [("self", 2), ("other", 2)]
    assert not birth.from_asked
    assert births(record(lambda: x / (y + 1))) == []


@pytest.mark.parametrize(
    ("function", "births_of"),
    [
        (lambda x: (x - 5).sqrt().exp() * 2, ["aten::sqrt"]),
        (lambda x: (x * 1e4).exp().log() - 1, ["aten::exp"]),
        (lambda x: (x * 1e4).exp() * 0, ["aten::exp"]),
        (lambda x: (x * 0).log().softmax(0), ["aten::log"]),
        (lambda x: x * 3e38 * 10, ["aten::mul"]),
        (lambda x: (x * 1e30).to(torch.float16), ["aten::_to_copy"]),
        (lambda x: torch.complex(x * 3e38, x * 3e38).abs(), ["aten::abs"]),
        (lambda x: torch.complex(x * 0, x * 0).add(1j * math.pi / 2).cosh(), []),
        (lambda x: torch.linalg.inv(torch.eye(2) * 1e-39), ["aten::linalg_inv_ex"]),
    ],
)
def test_only_the_maker_gives_birth(function, births_of):
    """What later ops do with a value that arithmetic made is propagation."""
    events = record(lambda: function(torch.tensor([1.0, 1.0])))
    assert births(events) == births_of


def test_second_birth_beside_a_propagation():
    """A pointwise op may pass one element on and make another."""
    x = torch.tensor([-1.0, 0.0, 1.0])
    events = record(lambda: torch.reciprocal(x.sqrt()))
    assert births(events) == ["aten::sqrt", "aten::reciprocal"]
    reciprocal = only(events, "aten::reciprocal")
    assert (reciprocal.birth.indices, reciprocal.sources) == (((1,),), ((0,),))
    assert reciprocal.inputs == (TensorFacts((3,), "float32", nan=1),)


ASKED = {
    "masked_fill": lambda x: x.masked_fill(x > 1, -INF),
    "full": lambda x: x + torch.full((2,), INF),
    "literal": lambda x: x + torch.tensor([-INF, 0.0]),
    "where": lambda x: torch.where(x > 1, -INF, x),
    "fill_": lambda x: x.clone().fill_(-INF),
    "index assignment": lambda x: x.clone().index_fill_(0, torch.tensor([0]), -INF),
    "number": lambda x: x + INF,
    "clamped": lambda x: torch.full((2,), INF).minimum(torch.full((2,), INF)),
}


@pytest.mark.parametrize("name", ASKED)
def test_infinities_that_were_asked_for_are_no_births(name):
    """The op that turns one into NaN is; one that keeps it finite is harmless."""
    x = torch.tensor([1.0, 2.0])
    events = record(lambda: ASKED[name](x))
    assert births(events) == []
    assert events[-1].asked
    assert births(record(lambda: ASKED[name](x).exp().tanh())) == []
    spoiled = record(lambda: ASKED[name](x) * 0)
    assert births(spoiled) == ["aten::mul"]
    assert spoiled[-1].birth.from_asked
    assert spoiled[-1].birth.kind == "nan"


def test_an_infinity_that_is_a_plain_number_was_asked_for():
    """0 times a literal infinity is NaN as 0 times a mask is."""
    event = only(record(lambda: torch.zeros(2) * INF), "aten::mul")
    assert event.birth.from_asked
    assert not only(record(lambda: torch.zeros(2) / 0.0), "aten::div").birth.from_asked


def test_softmax_of_a_masked_row():
    """A row with one entry left is fine; the row without any is born NaN."""
    mask = torch.tensor([[True, False], [True, True]])
    scores = torch.zeros(2, 2)
    events = record(lambda: scores.masked_fill(mask, -INF).softmax(-1))
    assert births(events) == ["aten::_softmax"]
    assert events[-1].birth.indices == ((1, 0), (1, 1))
    assert births(record(lambda: scores.masked_fill(mask[:1], -INF).softmax(-1))) == []


def test_in_place_births():
    """The value that an in-place op overwrote was finite."""
    x = torch.tensor([-1.0, 4.0])
    events = record(lambda: x.mul_(2).sqrt_().sqrt_().add_(1))
    assert births(events) == ["aten::sqrt_"]


# -- data flow -------------------------------------------------------------------------------------


def test_sources_follow_views_and_partial_writes():
    """A view shares its maker; a partial write adds a source, a whole one replaces all."""
    recorder = Recorder(scope=Scope(shapes=True))
    out, x = torch.zeros(2, 2), torch.tensor([-1.0, 0.0])
    with recorder.recording():
        out[0] = x.sqrt()
        out.t()[1, 1] = x[1].log()
        partly = recorder.sources_of(out)
        copied = out.reshape(-1).exp()
        out.copy_(torch.ones(2, 2))
    events = recorder.events()
    assert [events[i].op for i in partly] == ["aten::copy_", "aten::copy_"]
    assert [events[i].frame.line for i in partly] == sorted(events[i].frame.line for i in partly)
    exp = only(events, "aten::exp")
    assert exp.sources == (partly,)
    assert [events[i].op for i in recorder.sources_of(copied)] == ["aten::exp"]
    assert recorder.sources_of(out) == ()


def test_a_repaired_element_is_forgotten():
    """A part that is finite again has no source left, so that the next one stands alone."""
    recorder = Recorder(scope=Scope(shapes=True))
    out, x = torch.zeros(2), torch.tensor([-1.0, 0.0])
    with recorder.recording():
        out[0] = x[0].sqrt()
        out[0] = 0.0
        assert recorder.sources_of(out) == ()
        out[1] = x[1].log()
    (source,) = recorder.sources_of(out)
    assert [recorder.events()[i].op for i in recorder.events()[source].parents] == ["aten::log"]


def test_counts_are_fresh_after_a_partial_repair():
    """A view that was counted non-finite is counted anew after something wrote to it."""
    out, x = torch.zeros(3), torch.tensor([-1.0, 0.0])

    def step():
        out[0] = x[0].sqrt()
        out[1] = x[1].log()
        out[:1].exp()
        out[0] = 1.0
        return out[:1].cumprod(0), (out[:1] * 3e38).cumsum(0)

    events = record(step)
    assert only(events, "aten::cumprod").inputs == (TensorFacts((1,), "float32"),)
    assert only(events, "aten::cumsum").is_finite


def test_a_new_tensor_at_an_old_address_is_a_new_tensor():
    """Memory that held a NaN and was freed says nothing about who gets it next."""
    half = np.full(3, 0.5, dtype=np.float32)
    x = torch.full((3,), -1.0)

    def step():
        for _ in range(30):
            bad = x.sqrt() * 2
            del bad
            for _ in range(3):
                torch.from_numpy(half) * 1.5

    products = [e for e in record(step) if e.op == "aten::mul" and e.outputs[0].is_finite]
    assert len(products) == 90
    assert all(e.sources == () and e.inputs[0].is_finite for e in products)


def test_a_tensor_from_outside_is_state():
    """Its NaN was there before; an infinity there was asked for."""
    nan, inf = torch.tensor([NAN, 1.0]), torch.tensor([INF, 1.0])
    recorder = Recorder(scope=Scope(shapes=True))
    with recorder.recording():
        made = nan * 2
        fine = inf + 1
    assert recorder.sources_of(made) == (0,)
    assert [sink.kind for sink in recorder.state] == ["captured", "captured"]
    assert births(recorder.events()) == []
    assert [e.asked for e in recorder.events()] == [False, True]
    assert recorder.events()[0].parents == (-1,)
    assert recorder.sources_of(fine) == (1,)


def test_in_place_ops_on_a_tensor_from_outside():
    """A running mean that was NaN before is state; the one that overflows now is a birth."""
    old, new, unread = torch.tensor([NAN, 1.0]), torch.tensor([3e38]), torch.full((2,), NAN)
    events = record(lambda: (old.mul_(0.9).add_(1), new.mul_(2), unread.fill_(1).add_(1)))
    assert births(events) == ["aten::mul_"]
    assert events[0].parents == (-1,)
    assert only([e for e in events if e.birth], "aten::mul_").outputs[0].shape == (1,)
    assert events[-1].is_finite


def test_noted_state_is_named_in_sources():
    """What the step started from has a negative number."""
    buffer = torch.tensor([NAN])
    recorder = Recorder(scope=Scope(shapes=True))
    facts = TensorFacts((1,), "float32", nan=1)
    with recorder.recording():
        recorder.note_state(Sink("buffer", "mean", facts), buffer)
        buffer.add_(1)
    assert recorder.events()[0].parents == (-1,)
    assert recorder.state[0].name == "mean"
    assert births(recorder.events()) == []


# -- nothing stays, nothing changes ----------------------------------------------------------------


def global_hooks():
    modules = nn.modules.module
    names = [name for name in vars(modules) if name.startswith("_global_") and "hook" in name]
    return {name: len(getattr(modules, name) or ()) for name in names}


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_nothing_stays_behind(error):
    """Hooks and modes are gone, whatever the model raised."""

    class Model(nn.Linear):
        def forward(self, x):
            if error is not None:
                raise error
            return super().forward(x)

    model, before = Model(2, 2), global_hooks()
    recorder = Recorder(scope=Scope(shapes=True))
    raising = pytest.raises(error) if error else contextlib.nullcontext()
    with raising, recorder.recording(model):
        assert global_hooks() != before
        model(torch.ones(1, 2)).sum().backward()
    assert global_hooks() == before
    assert _get_current_dispatch_mode_stack() == []
    assert not any(model.__dict__[n] for n in ("_forward_hooks", "_forward_pre_hooks"))
    seen = len(recorder.events())
    torch.ones(2).exp()
    assert len(recorder.events()) == seen


def test_recording_changes_no_bit():
    """Loss, gradients, buffers and random draws are those of an unrecorded step."""

    def step(recorded):
        torch.manual_seed(0)
        random.seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.GELU())
        recorder = Recorder(scope=Scope(shapes=True))
        with recorder.recording(model) if recorded else torch.enable_grad():
            loss = (model(torch.randn(8, 6)) * torch.rand(1)).square().mean()
            loss.backward()
        return [loss, *(p.grad for p in model.parameters()), *model.buffers(), torch.rand(2)]

    pairs = list(zip(step(False), step(True), strict=True))
    assert len(pairs) == 1 + 4 + 3 + 1
    assert all(torch.equal(plain, recorded) for plain, recorded in pairs)


def test_checkpointed_ops_are_seen_under_the_node_that_asked():
    """Recomputed ops run in the backward and keep their lines."""
    x = leaf(1.0, 2.0)

    def step():
        y = torch.utils.checkpoint.checkpoint(scaled_log, x, use_reentrant=False)
        return y.square().sum()

    logs = [e for e in record(step) if e.op == "aten::log"]
    assert [e.phase for e in logs] == ["forward", "backward"]
    assert [e.frame.line for e in logs] == [line_of("helper")] * 2
    assert logs[1].node is not None


def test_compiled_functions_are_seen_and_stay_compiled():
    """The ops of a compiled function are recorded eagerly; its compiled code survives."""
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    function = torch.compile(lambda x: x.sin().sum(), backend=backend)
    x = torch.ones(3, requires_grad=True)
    function(x)
    events = record(lambda: function(x))
    function(x)
    assert [e.op for e in events if e.phase == "forward"] == ["aten::sin", "aten::sum"]
    assert len(compiled) == 1


def test_shapes_are_noted_on_request_and_dtypes_always():
    """Of an op that met nothing non-finite, only the dtype that can overflow is kept."""
    x = torch.ones(2, 3, dtype=torch.float16)
    for shapes in (False, True):
        recorder = Recorder(scope=Scope(shapes=shapes))
        with recorder.recording():
            torch.topk(x, 1)
            x > 0  # noqa: B015 - only its dtype matters
            x.sum() / 0
        top, above, total, divided = recorder.events()
        assert [e.dtype for e in (top, above, total)] == ["float16", "bool", "float16"]
        assert bool(top.inputs) == bool(top.outputs) == shapes
        assert divided.outputs == (TensorFacts((), "float16", posinf=1),)
