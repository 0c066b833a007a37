"""The look at what is on a device, with a CPU that is taken for one: read once, and never wrong."""

import gc
import math
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from nanhunt.recorder import Deferred, Recorder, Scope
from nanhunt.replay import replay
from nanhunt.subject import Subject
from nanhunt.variants import NATIVE, VARIANTS

INF, NAN = math.inf, math.nan


@pytest.fixture
def far(monkeypatch):
    """Every tensor counts as one on a device."""
    monkeypatch.setattr("nanhunt.recorder.deferred.is_far", lambda _tensor: True)


@pytest.fixture
def reads(monkeypatch):
    """The names of the ways in which numbers were read."""
    found = []

    def counted(name):
        read = getattr(torch.Tensor, name)

        def reading(tensor, *args):
            found.append(name)
            return read(tensor, *args)

        return reading

    for name in ("item", "tolist", "__float__", "__int__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    return found


class Net(nn.Module):
    """Something of everything: a norm in training, dropout, products, a softmax."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(16, 4)

    def forward(self, x):
        return self.last(self.drop(self.norm(self.first(x)))).softmax(-1)


def subject_of(loss_fn, **options):
    """A subject of that network; the optimizer takes part in its step."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    return Subject(model, [(torch.randn(32, 8),)], loss_fn, optimizer=optimizer, **options)


def both(monkeypatch, loss_fn, scope, variant=NATIVE):
    """Replays of a step as on a CPU and as on a device, and how often the latter took the step."""
    taken = []

    def counted(model, x):
        taken.append(1)
        return loss_fn(model, x)

    near = replay(subject_of(counted), (torch.randn(32, 8),), variant, scope=scope)
    taken.clear()
    monkeypatch.setattr("nanhunt.recorder.deferred.is_far", lambda _tensor: True)
    far = replay(subject_of(counted), (torch.randn(32, 8),), variant, scope=scope)
    return near, far, len(taken)


def told(done):
    """All that a replay recorded; a process numbers its nodes through, and NaN equals nothing."""
    trace, first = done.trace, done.trace.events[0].made
    events = [
        replace(
            event,
            made=None if event.made is None else event.made - first,
            number=None if event.number is None else event.number - first,
        )
        for event in trace.events
    ]
    return [repr(e) for e in (*events, *trace.sinks, *trace.state, *trace.passages, *trace.outputs)]


def healthy(model, x):
    return model(x).square().mean()


def born_in_forward(model, x):
    return (model(x) - 1).log().mean()


def born_in_backward(model, x):
    return (model(x) * 0).sqrt().mean()


def cured_at_once(model, x):
    return (model(x) * 0).log().exp().mean()


def masked(model, x):
    scores = model(x)
    mask = torch.zeros(4, dtype=torch.bool)
    mask[1:] = True
    return scores.masked_fill(mask, -INF).softmax(-1).square().mean()


def overwritten(model, x):
    scores = model(x)
    return scores.mul(2).div_(scores.detach() * 0).clamp_(0, 1).mean()


# -- the look --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("far")
def test_a_step_reads_nothing_and_its_end_once(reads):
    """No op waits for the device, those that overwrite neither; one number tells of all."""
    model, x = Net(), torch.randn(32, 8)

    def step():
        model(x).square().mean().mul_(2).backward()

    with Recorder().recording(model):
        step()
    assert len(reads) > 20  # as it is without
    reads.clear()
    deferred = Deferred()
    with Recorder(look=deferred).recording(model):
        step()
    assert reads == []
    assert deferred.holds()
    assert reads == ["__float__"]


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16,
                                   torch.complex64])  # fmt: skip
def test_every_kind_of_number_is_found(value, dtype):
    """Among many finite ones, in an output, in one of several, and in what is overwritten."""
    bad, good = torch.ones(5, 7).to(dtype), torch.ones(5, 7).to(dtype)
    bad[2, 3] = value
    for outputs in (None, [good, bad]):
        deferred = Deferred()
        assert deferred.is_cleared(None, (), bad, outputs)
        assert not deferred.holds()
    deferred = Deferred()
    assert deferred.is_clear_at_first((bad,))
    assert not deferred.holds()
    deferred = Deferred()
    assert deferred.is_cleared(None, (), good, None)
    assert deferred.is_clear_at_first((good,))
    assert deferred.is_cleared(None, (), torch.ones(3, dtype=torch.long), None)
    assert deferred.holds()


def test_what_is_near_is_looked_at_at_once():
    """On a CPU nothing is put off."""
    deferred = Deferred()
    assert deferred.is_cleared(None, (), torch.ones(3), None)
    assert not deferred.is_cleared(None, (), torch.tensor([1.0, NAN]), None)
    assert not deferred.is_clear_at_first((torch.tensor([INF]),))
    assert deferred.holds()
    assert not Deferred.concerns([torch.ones(3)])


@pytest.mark.usefixtures("far")
def test_nothing_is_kept_alive():
    """What is noted of an output is a number of its own memory."""
    deferred = Deferred()
    output = torch.ones(1000)
    deferred.is_cleared(None, (), output, None)
    gone = weakref.ref(output)
    del output
    gc.collect()
    assert gone() is None
    assert deferred.holds()


# -- replays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_fn", [healthy, masked])
@pytest.mark.parametrize("variant", ["native", "fp64", "amp-bf16"])
def test_a_healthy_step_is_taken_once_and_told_the_same(monkeypatch, loss_fn, variant):
    """An infinity that is written down is no reason to take it again."""
    scope = Scope(modules=True, shapes=True)
    near, far, taken = both(monkeypatch, loss_fn, scope, VARIANTS[variant])
    assert taken == 1
    assert told(far) == told(near)
    assert far.fingerprint == near.fingerprint


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize("end", [lambda y: y, lambda y: y.masked_fill(y > 2, -INF).exp()])
def test_reads_of_a_replay_do_not_grow_with_its_ops(reads, end):
    """What is measured at its stations is read there; of the ops in between one number is."""
    counts = []
    for length in (1, 40):

        def loss_fn(model, x, length=length):
            y = end(model(x))
            for _ in range(length):
                y = y.mul(1.01).clone().add_(0.1)
            return y.square().mean()

        reads.clear()
        assert replay(subject_of(loss_fn), (torch.ones(32, 8),), scope=Scope()).run.is_finite
        counts.append(len(reads))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("loss_fn", [born_in_forward, born_in_backward, cured_at_once, overwritten])
def test_a_step_with_a_birth_is_taken_again_and_told_the_same(monkeypatch, loss_fn):
    """Births, sources, counts and evidence are those of a CPU, and all was put back in between."""
    near, far, taken = both(monkeypatch, loss_fn, Scope(modules=True))
    assert any(event.birth is not None for event in near.trace.events)
    assert taken == 2
    assert told(far) == told(near)
    assert far.fingerprint == near.fingerprint


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize(("loss_fn", "backwards"), [(born_in_forward, 1), (born_in_backward, 2)])
def test_a_step_that_is_taken_in_vain_ends_at_its_next_station(loss_fn, backwards):
    """A loss that is not finite has no backward before the step is taken again."""
    seen = []

    def counted(model, x):
        loss = loss_fn(model, x)
        loss.register_hook(seen.append)
        return loss

    done = replay(subject_of(counted), (torch.randn(32, 8),), scope=Scope())
    assert done.trace.events
    assert len(seen) == backwards


@pytest.mark.parametrize("scope", [Scope(repair=frozenset([3])), Scope(keep=10**6)])
def test_steps_that_are_known_to_fail_are_looked_at_op_by_op(monkeypatch, scope):
    """To take them twice would be in vain."""
    near, far, taken = both(monkeypatch, born_in_forward, scope)
    assert taken == 1
    assert told(far) == told(near)
