"""Recorder and variants in the threads that a step starts: what is seen there, and what stays."""

import contextlib
import inspect
import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from nanhunt.analysis import find_culprits, find_suspects
from nanhunt.interventions import PrecisionRewriting
from nanhunt.recorder import Recorder, Scope
from nanhunt.records import OpEvent, Trace
from nanhunt.replay import replay
from nanhunt.subject import Subject
from nanhunt.variants import NATIVE, VARIANTS

START, RUN, SUBMIT = threading.Thread.start, threading.Thread.run, ThreadPoolExecutor.submit


@pytest.fixture(autouse=True)
def nothing_stays():
    """After every test here threads start as before."""
    yield
    assert (threading.Thread.start, threading.Thread.run) == (START, RUN)
    assert ThreadPoolExecutor.submit is SUBMIT
    assert _get_current_dispatch_mode_stack() == []


def line_of(text):
    """The line of this file that ends in a mark."""
    lines = inspect.getsource(inspect.getmodule(line_of)).splitlines()
    return next(n for n, line in enumerate(lines, 1) if line.endswith(f"# {text}"))


def births(events):
    return [event.op for event in events if event.birth is not None]


def single():
    """A tensor that is to be of FP32."""
    return torch.ones(2, dtype=torch.float32)


def in_thread(function, *args):
    """Call a function in a thread of its own and wait."""
    returned = []
    thread = threading.Thread(target=lambda: returned.append(function(*args)))
    thread.start()
    thread.join()
    return returned[0]


def in_pool(function, *args):
    """Call a function in a pool and wait."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def in_mapped_pool(function, *args):
    """As above, by `map`."""
    with ThreadPoolExecutor(2) as pool:
        return next(pool.map(function, *([arg] for arg in args)))


def in_thread_of_thread(function, *args):
    """A thread that was started by one."""
    return in_thread(in_thread, function, *args)


class Derived(threading.Thread):
    """A thread with a `run` of its own."""

    def __init__(self, function, args):
        super().__init__()
        self.function, self.arguments = function, args

    def run(self):
        self.returned = self.function(*self.arguments)


def in_derived(function, *args):
    thread = Derived(function, args)
    thread.start()
    thread.join()
    assert "run" not in vars(thread)
    return thread.returned


WAYS = [in_thread, in_pool, in_mapped_pool, in_thread_of_thread, in_derived]


class Split(nn.Module):
    """Two branches, each in another thread, or in the main one."""

    def __init__(self, way, *, fault="none"):
        super().__init__()
        self.way, self.fault = way, fault
        self.branches = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def work(self, i, x):
        y = self.branches[i](x)
        if self.fault == "forward" and i == 1:
            y = (y * 0 - 1).sqrt()  # planted in the forward
        if self.fault == "backward" and i == 1:
            return (y * 0).sqrt()  # planted in the backward
        return (y * 0 + 1).sqrt()  # harmless

    def forward(self, x):
        return torch.stack([self.way(self.work, i, x) for i in range(2)])


def subject(model):
    return Subject(
        model=model, loss_fn=lambda model, x: model(x).mean(), batches=[torch.ones(2, 3)]
    )


def trace_of(model, variant=NATIVE):
    examined = subject(model)
    return replay(examined, examined.batch(0), variant, scope=Scope(modules=True)).trace


# -- what is seen ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_fault_in_the_forward_of_a_thread(way):
    """It is a birth with its line, and not a tensor from outside the step."""
    (finding, *_) = find_culprits(trace_of(Split(way, fault="forward")))
    assert (finding.phase, finding.op) == ("forward", "aten::sqrt")
    assert finding.line == line_of("planted in the forward")


@pytest.mark.parametrize("way", WAYS)
def test_fault_in_the_backward_of_what_a_thread_did(way):
    """Numbers and ops of the two threads are the same; the node itself tells which it was."""
    trace = trace_of(Split(way, fault="backward"))
    (suspect,) = find_suspects(trace)
    finding = suspect.finding
    assert (finding.phase, finding.op, finding.node) == ("backward", "aten::sqrt", "SqrtBackward0")
    assert finding.line == line_of("planted in the backward")
    assert suspect.origin.thread == max(event.thread for event in trace.events)


@pytest.mark.parametrize("way", WAYS)
def test_healthy_twin_is_silent(way):
    trace = trace_of(Split(way))
    assert find_culprits(trace) == ()
    assert births(trace.events) == []


@pytest.mark.parametrize("way", WAYS)
def test_modules_and_threads_of_the_ops(way):
    """A thread begins in the module that started it, and goes into and out of its own."""
    events = trace_of(Split(way)).events
    found = {(e.op, e.module): e.thread for e in events if e.phase == "forward"}
    first, second = (found["aten::addmm", f"branches.{i}"] for i in range(2))
    assert 0 < first < second
    assert found["aten::mul", "(model)"] == second
    assert found["aten::stack", "(model)"] == found["aten::mean", ""] == 0
    assert {e.thread for e in events if e.phase == "backward"} == {0}
    nodes = {e.made_in for e in events if e.node == "SqrtBackward0"}
    assert nodes == {first, second}


def test_passages_of_modules_in_threads():
    trace = trace_of(Split(in_thread))
    seen = {(passage.module, passage.direction) for passage in trace.passages}
    assert {(f"branches.{i}", way) for i in range(2) for way in ("forward", "backward")} <= seen


def test_a_backward_inside_a_thread():
    """A penalty on a gradient, computed in a thread, has its nodes and its lines."""
    x = torch.zeros(2, requires_grad=True)

    def work():
        y = x.sqrt()  # differentiated in a thread
        return torch.autograd.grad(y.sum(), x)[0]

    recorder = Recorder()
    with recorder.recording():
        in_thread(work)
    (event,) = [event for event in recorder.events() if event.birth is not None]
    made = next(e for e in recorder.events() if e.op == "aten::sqrt")
    assert (event.phase, event.node, event.thread) == ("backward", "SqrtBackward0", 1)
    assert (event.number, event.made_in) == (made.made, 1)


def test_in_place_write_to_a_view_in_a_thread():
    """It runs under a number that no forward event has; the one before leads to its line."""

    def work(x):
        y = x * 0
        y[:1].sqrt_()  # in place in a thread
        return y

    model = nn.Linear(3, 3)
    examined = Subject(
        model=model,
        loss_fn=lambda model, x: in_thread(work, model(x)).sum() + model(x).sum(),
        batches=[torch.ones(2, 3)],
    )
    trace = replay(examined, examined.batch(0)).trace
    assert find_culprits(trace)[0].line == line_of("in place in a thread")


def test_line_of_an_op_without_a_line_of_its_own():
    """Where a thread runs only code of torch, its ops stand on the line that started it."""
    x = torch.tensor([-1.0])
    recorder = Recorder()
    with recorder.recording(), ThreadPoolExecutor(1) as pool:
        thread = threading.Thread(target=torch.sqrt, args=(x,))
        thread.start()  # started
        thread.join()
        pool.submit(torch.log, x).result()  # submitted
    lines = {e.op: e.frame.line for e in recorder.events()}
    assert lines == {"aten::sqrt": line_of("started"), "aten::log": line_of("submitted")}


def test_a_pool_older_than_the_block():
    """The call is covered and not the worker, which goes on as it was."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(torch.ones, 1).result()
        recorder = Recorder()
        with recorder.recording():
            pool.submit(torch.ones(1).exp).result()
        pool.submit(torch.ones(1).log).result()
        assert pool.submit(_get_current_dispatch_mode_stack).result() == []
    assert [(e.op, e.thread) for e in recorder.events() if e.thread] == [("aten::exp", 1)]


def test_threads_at_once():
    """No event of one thread is taken for one of another, whatever their order."""
    barrier = threading.Barrier(4)
    # As wide as it takes for the threads to take turns inside of ops.
    start = torch.full((20_000,), -1.0)

    def work(i):
        barrier.wait(60)
        x = start * (i + 1)
        for _ in range(30):
            x = x.sqrt() * 2
        return x

    recorder = Recorder()
    with recorder.recording(), ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    events = recorder.events()
    assert [e.index for e in events] == list(range(4 * 61))
    assert births(events) == ["aten::sqrt"] * 4
    for thread in range(1, 5):
        own = [e for e in events if e.thread == thread]
        assert [e.op for e in own[1:]] == ["aten::sqrt", "aten::mul"] * 30
        assert [e.parents for e in own[2:]] == [(e.index,) for e in own[1:-1]]


# -- whose number it is ----------------------------------------------------------------------------


def test_of_makers_with_one_number_the_fitting_one_is_taken():
    """Where the node does not tell its thread: by its name, and else the main thread's."""
    rows = [("aten::sqrt", 0), ("aten::div_", 1), ("aten::mm", 2), ("aten::nll_loss_forward", 3)]
    made = [OpEvent(i, "forward", op, (), (), made=7, thread=t) for i, (op, t) in enumerate(rows)]
    origins = find_origins(made)

    def maker(node, **known):
        return origins.of(OpEvent(9, "backward", "aten::mul", (), (), node, 7, **known)).op

    assert maker("DivBackward0") == "aten::div_"
    assert maker("MmBackward0") == "aten::mm"
    assert maker("NllLossBackward0") == "aten::nll_loss_forward"
    assert maker("SqrtBackward0") == maker("CubeBackward") == maker("CopySlices") == "aten::sqrt"
    assert maker("SqrtBackward0", made_in=2) == "aten::mm"
    assert find_origins(made[1:]).of(made[0]) == made[0]


def find_origins(events):
    from nanhunt.analysis.origins import Origins

    return Origins(Trace(tuple(events), ()))


# -- other modes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_precision_goes_on_in_threads(way):
    trace = trace_of(Split(way), VARIANTS["fp64"])
    assert {e.dtype for e in trace.events if e.thread} == {"float64"}


def test_order_of_the_modes():
    """The recorder sees what the mode above it made of the op."""
    recorder = Recorder()
    with recorder.recording(), PrecisionRewriting(torch.float64):
        in_thread(single)
    assert [(e.op, e.dtype) for e in recorder.events()] == [("aten::ones", "float64")]


class Foreign(TorchDispatchMode):
    """A mode of the program itself."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_what_is_the_programs_own_stays_as_it_is():
    """Its modes, autocast and grad mode do not pass to its threads, here as without us."""

    def state():
        modes = [type(mode).__name__ for mode in _get_current_dispatch_mode_stack()]
        return modes, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    with Recorder().recording(), Foreign(), torch.no_grad(), torch.autocast("cpu"):
        assert in_thread(state) == in_pool(state) == (["Carried"], True, False)
    assert in_thread(state) == ([], True, False)


# -- nothing stays ---------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_an_error_in_a_thread_leaves_nothing_behind(error):
    """It reaches whom it would have reached, and the block goes on."""
    told = queue.SimpleQueue()

    def fail():
        torch.ones(1).exp()
        raise error

    def work():
        with contextlib.suppress(error):
            fail()
        told.put(len(_get_current_dispatch_mode_stack()))
        raise error

    recorder, hook = Recorder(), threading.excepthook
    threading.excepthook = lambda given: told.put(given.exc_type)
    try:
        with recorder.recording(), ThreadPoolExecutor(1) as pool:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            assert isinstance(pool.submit(fail).exception(), error)
            assert pool.submit(len, ()).result() == 0
            assert recorder._here() is recorder
    finally:
        threading.excepthook = hook
    assert told.get() == 1
    if error is ValueError:
        assert told.get() is ValueError
    assert [e.thread for e in recorder.events() if e.op == "aten::exp"] == [1, 2]


def test_an_error_in_the_block():
    def step():
        assert threading.Thread.start is not START
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Recorder().recording():
        step()


def test_a_thread_that_cannot_be_started():
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    with Recorder().recording(), pytest.raises(RuntimeError, match="only be started once"):
        thread.start()
    assert "run" not in vars(thread)


def test_a_thread_that_outlives_the_block():
    """It runs on as if nobody had recorded it."""
    asked, answered = queue.SimpleQueue(), queue.SimpleQueue()

    def work():
        while asked.get():
            answered.put(single().dtype)

    recorder = Recorder()
    thread = threading.Thread(target=work, daemon=True)
    with recorder.recording(), PrecisionRewriting(torch.float64):
        thread.start()
        asked.put(True)
        assert answered.get(timeout=60) == torch.float64
    seen = len(recorder.events())
    asked.put(True)
    assert answered.get(timeout=60) == torch.float32
    asked.put(False)
    thread.join()
    assert len(recorder.events()) == seen == 1


def test_blocks_inside_each_other():
    """The threads of each belong to the modes that were active when they started."""
    outer, inner = Recorder(), Recorder()
    with outer.recording():
        with inner.recording():
            in_thread(torch.ones, 1)
        in_thread(torch.zeros, 1)
    assert [e.op for e in inner.events()] == ["aten::ones"]
    assert [e.op for e in outer.events()] == ["aten::ones", "aten::zeros"]


@pytest.mark.parametrize("way", WAYS)
def test_recording_changes_no_bit(way):
    """Loss and gradients are those of an unrecorded step."""
    torch.manual_seed(0)
    model = Split(way)
    examined = subject(model)
    plain, recorded = (replay(examined, examined.batch(0), scope=s) for s in (None, Scope()))
    assert plain.fingerprint == recorded.fingerprint
