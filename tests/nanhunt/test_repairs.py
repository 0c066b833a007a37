"""Repairs at birth: of several births that reach the sinks, which are guilty."""

import inspect
import itertools
import math

import pytest
import torch
from torch import nn

from nanhunt.analysis import Suspect, find_suspects, is_cured
from nanhunt.hunting import hunt
from nanhunt.hunting.repairs import MOST, decide, first_of_step, indices, is_replayable
from nanhunt.recorder import Scope
from nanhunt.records import Finding, OpEvent, Trace
from nanhunt.replay import replay
from nanhunt.subject import Subject
from nanhunt.variants import NATIVE

INF, NAN = math.inf, math.nan


# -- the decision, without torch -------------------------------------------------------------------


def event(index, step=0):
    return OpEvent(index, "forward", "aten::log", (), (), step=step)


def suspect(*numbers, step=0):
    """One who made non-finite values in these events."""
    return Suspect(Finding("forward", "aten::log"), tuple(event(n, step) for n in numbers))


DATA = Suspect(Finding("data", "input"))


class Replays:
    """Cured where all the guilty are repaired; remembers who was."""

    def __init__(self, *guilty):
        self.guilty, self.tried = guilty, []

    def __call__(self, repaired):
        self.tried.append(tuple(repaired))
        return all(one in repaired for one in self.guilty)


@pytest.mark.parametrize("suspects", [(), (suspect(3),), (DATA,), (DATA, suspect(3))])
def test_nothing_to_decide(suspects):
    """One suspect needs no replay, and what came with the step cannot be repaired."""
    replays = Replays()
    decision = decide(suspects, replays)
    assert (decision.culprits, decision.note, replays.tried) == (tuple(suspects[:1]), "", [])


@pytest.mark.parametrize("number", [2, 3, 5])
def test_one_is_guilty(number):
    """The earliest whose repair alone cures; the later ones are not even tried."""
    for guilty in range(number):
        suspects = [suspect(i) for i in range(number)]
        replays = Replays(suspects[guilty])
        decision = decide(suspects, replays)
        assert decision.culprits == (suspects[guilty],)
        assert replays.tried == [(s,) for s in suspects[: guilty + 1]]
        others = {2: "1 other birth", 3: "2 other births", 5: "4 other births"}[number]
        does = "does" if number == 2 else "do"
        assert decision.note == (
            f"{others} on the way to it {does} not matter: with this one repaired at birth the "
            f"step is finite (replayed)"
        )


def test_earliest_of_several_that_cure():
    """A chain: whoever is repaired, the rest never comes to be; the first is named."""
    suspects = [suspect(i) for i in range(3)]
    decision = decide(suspects, lambda repaired: len(repaired) > 0)
    assert decision.culprits == (suspects[0],)


def guilty_sets():
    return [set(c) for n in (2, 3, 4) for c in itertools.combinations(range(4), n)]


@pytest.mark.parametrize("guilty", guilty_sets(), ids=str)
def test_several_are_guilty(guilty):
    """All of them and no other, in the order of time."""
    suspects = [suspect(i) for i in range(4)]
    decision = decide(suspects, Replays(*(suspects[i] for i in guilty)))
    assert decision.culprits == tuple(suspects[i] for i in sorted(guilty))
    assert decision.note == (
        f"{len(guilty)} births are independent: repairing all of them at birth makes the step "
        f"finite, and with any one left it is not (replayed)"
    )


def test_either_of_two_repairs_will_do():
    """The smallest set that cures: here the first with one of the others."""
    suspects = [suspect(i) for i in range(3)]
    first, second, third = suspects
    replays = [{0, 1}, {0, 2}, {0, 1, 2}]
    numbers = {id(first): 0, id(second): 1, id(third): 2}
    decision = decide(suspects, lambda repaired: {numbers[id(s)] for s in repaired} in replays)
    assert decision.culprits == (first, second)


def test_no_repair_cures():
    """Then the first is named, and the note says why."""
    suspects = [suspect(i) for i in range(3)]
    decision = decide(suspects, lambda repaired: False)
    assert decision.culprits == (suspects[0],)
    assert decision.note == (
        "3 births reach the sinks and repairing all of them does not cure: the first is named"
    )


def test_many_suspects():
    """Only the first few are tried one by one; all together still tells."""
    suspects = [suspect(i) for i in range(MOST + 4)]
    replays = Replays(suspects[2], suspects[MOST + 1])
    decision = decide(suspects, replays)
    assert decision.culprits == (suspects[2], suspects[MOST + 1])
    assert sum(len(repaired) == 1 for repaired in replays.tried) == MOST


def test_events_are_counted_from_the_step_that_is_replayed():
    """A trace of several steps ends with the one that failed."""
    events = (event(0, step=1), event(1, step=1), event(2, step=4), event(3, step=4))
    trace = Trace(events, ())
    assert (first_of_step(trace), first_of_step(Trace((), ()))) == (2, 0)
    assert indices([suspect(3, 2), suspect(3)], trace) == {0, 1}
    assert is_replayable([suspect(2, 3, step=4)], trace)
    assert not is_replayable([suspect(3, step=4), suspect(1, step=1)], trace)
    assert indices([suspect(1)], Trace(events[:2], ())) == {1}


# -- end to end ------------------------------------------------------------------------------------

X = torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 0.0]])


class Scale(nn.Module):
    """Multiplies by a weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.weight * x


def find(loss_fn, batch=(X,), *, model=None, steps=1, **options):
    """The report of a native hunt alone."""
    subject = Subject(model or Scale(), [batch], loss_fn, **options)
    return hunt(subject, precisions=("native",), steps=steps)


def mark(found):
    """The mark at the end of the line that was named."""
    assert found.file.endswith("test_repairs.py")
    line = inspect.getsource(inspect.getmodule(mark)).splitlines()[found.line - 1]
    return line.rpartition("# ")[2]


def named(report):
    """Phase and mark of each culprit."""
    assert report.verdict == "culprit"
    return [(found.phase, mark(found)) for found in report.culprits]


def masked_before(m, x):
    y = m(x)
    harmless = (y - 9).log()  # masked
    guilty = (y - 8).sqrt()  # guilty
    return torch.where(y > 100, harmless, guilty).sum()


def masked_after(m, x):
    y = m(x)
    guilty = (y - 8).sqrt()  # guilty
    harmless = (y - 9).log()  # masked
    return torch.where(y > 100, harmless, guilty).sum()


@pytest.mark.parametrize("loss_fn", [masked_before, masked_after])
def test_masked_birth_is_not_blamed(loss_fn):
    """What `where` did not choose is harmless, whichever came first."""
    report = find(loss_fn)
    assert named(report) == [("forward", "guilty")]
    about = [note for note in report.notes if "on the way to it" in note]
    words = "1 other birth on the way to it does not matter: with this one repaired at birth the "
    assert about == [words + "step is finite (replayed)"]


def test_two_faults_in_the_forward():
    """Both, in the order of time, each with its own line and evidence."""

    def loss_fn(m, x):
        y = m(x)
        first = (y - 9).log()  # first
        second = (y - 8).sqrt()  # second
        return first.sum() + second.sum()

    report = find(loss_fn)
    assert named(report) == [("forward", "first"), ("forward", "second")]
    assert [found.cause for found in report.culprits] == ["domain_error", "domain_error"]
    assert report.notes[0].startswith("2 births are independent: ")


def test_two_faults_and_a_harmless_birth():
    """The harmless one is left out, and the two stand."""

    def loss_fn(m, x):
        y = m(x)
        first = (y - 9).log()  # first
        harmless = (y - 7).sqrt()  # harmless
        second = torch.where(y > 100, harmless, (y - 8).sqrt())  # second
        return first.sum() + second.sum()

    assert named(find(loss_fn)) == [("forward", "first"), ("forward", "second")]


def test_one_line_that_fails_often_is_one_suspect():
    """Its births in a loop are repaired together."""

    def loss_fn(m, x):
        total = m(x).sum()
        for _ in range(12):
            total = total + (m(x) - 9).log().sum()  # again and again
        return total

    report = find(loss_fn)
    assert named(report) == [("forward", "again and again")]
    assert not [note for note in report.notes if "birth" in note]


def test_backward_fault_behind_a_forward_fault():
    """The loss hides the gradients; with it repaired the slope shows."""

    def loss_fn(m, x):
        y = m(x)
        visible = (y - 9).log()  # in front
        return visible.sum() + (y * 0).sqrt().sum()  # behind

    report = find(loss_fn)
    assert named(report) == [("forward", "in front"), ("backward", "behind")]
    assert [found.op for found in report.culprits] == ["aten::log", "aten::sqrt"]


def test_fault_behind_another_in_a_later_step():
    """It ran in the same step as the one that hid it."""

    def loss_fn(m, x):
        y = m(x)
        if x.sum() < 8:
            return y.sum()
        visible = (y - 9).log()  # in front
        return visible.sum() + (y * 0).sqrt().sum()  # behind

    model = Scale()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    subject = Subject(model, [(X,), (X,), (X * 2,)], loss_fn, optimizer=optimizer)
    report = hunt(subject, precisions=("native",), steps=3)
    assert named(report) == [("forward", "in front"), ("backward", "behind")]
    assert [found.step for found in report.culprits] == [2, 2]


def test_slope_of_what_was_repaired_is_no_second_fault():
    """One line is named once."""

    def loss_fn(m, x):
        return (m(x) - 9).sqrt().sum()  # alone

    assert named(find(loss_fn)) == [("forward", "alone")]


def test_optimizer_fault_behind_a_backward_fault():
    """Where the gradients are repaired the optimizer divides 0 by 0."""
    model = Scale()
    optimizer = torch.optim.Adam(model.parameters(), eps=0.0)

    def loss_fn(m, x):
        return (m(x) * 0).sqrt().sum()  # slope

    report = find(loss_fn, model=model, optimizer=optimizer)
    phases = [(found.phase, found.op) for found in report.culprits]
    assert phases == [("backward", "aten::sqrt"), ("optimizer", "aten::addcdiv_")]


def test_what_a_node_meets_of_the_forward_is_repaired_in_it():
    """The NaN that it kept is no excuse: the loss was finite all the same."""

    def loss_fn(m, x):
        error = (m(x) - torch.tensor([1.0, NAN, 2.0])) ** 2  # late
        return error[~error.isnan()].mean()

    report = find(loss_fn)
    assert named(report) == [("backward", "late")]
    assert [trial.finite for trial in report.trials if trial.is_neutralising] == [True]


def test_what_comes_to_a_node_is_not_repaired_in_it():
    """The slope of the root is a fault of its own, whatever the node behind it had kept."""

    def loss_fn(m, x):
        error = (m(x) - torch.tensor([1.0, NAN, 2.0])) ** 2  # late
        length = (error[~error.isnan()] * 0).sqrt()  # root
        return length.sum() + 0 * m(x).sum()

    report = find(loss_fn)
    assert named(report) == [("backward", "root"), ("backward", "late")]
    assert report.notes[0].startswith("2 births are independent: ")


def test_repair_that_does_not_cure():
    """Numbers that stand for the repaired ones may be no better; the first is named."""

    def loss_fn(m, x):
        y = m(x)
        first = (y - 9).log()  # first
        second = (y - 8).sqrt()
        return (first + second - 1).log().sum()

    report = find(loss_fn)
    assert named(report)[0] == ("forward", "first")
    assert (
        "2 births reach the sinks and repairing all of them does not cure: the first is named"
        in report.notes
    )


def test_step_that_is_not_deterministic_is_not_repaired():
    """A replay would not be the same step; the first is named without a claim."""
    calls = iter(range(100))

    def loss_fn(m, x):
        y = m(x) + next(calls) * 1e-3
        first = (y - 9).log()  # first
        return first.sum() + (y - 8).log().sum()

    report = find(loss_fn)
    assert report.deterministic is False
    assert named(report) == [("forward", "first")]
    assert not [note for note in report.notes if "birth" in note]


def test_everything_is_put_back():
    """Parameters, statistics, moments and the generators, after many repairs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(X).sum().backward()
    optimizer.step()

    def loss_fn(m, x):
        y = m(x)
        first = (y - 90).log()  # first
        return first.sum() + (y - 80).sqrt().sum() + (y * 0).sqrt().sum()

    def picture():
        moments = (v for values in optimizer.state.values() for v in values.values())
        tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
        return [t.detach().clone() for t in (*tensors, *moments, torch.get_rng_state())]

    before = picture()
    report = find(loss_fn, model=model, optimizer=optimizer)
    assert len(report.culprits) > 1
    assert all(map(torch.equal, before, picture()))
    again = find(loss_fn, model=model, optimizer=optimizer)
    assert (again.culprits, again.notes) == (report.culprits, report.notes)


def test_repaired_step_draws_the_same_numbers():
    """Dropout falls as it did, so that what is cured is this step and no other."""
    model = nn.Sequential(nn.Dropout(0.5), Scale())

    def loss_fn(m, x):
        y = m(x)
        return torch.where(y == 0, (y - 9).log(), (y - 8).sqrt()).sum()

    subject = Subject(model, [(X,)], loss_fn)
    traces = [replay(subject, (X,), NATIVE, scope=Scope()).trace]
    suspects = find_suspects(traces[0])
    assert len(suspects) == 2
    scope = Scope(repair=indices(suspects, traces[0]))
    repaired = replay(subject, (X,), NATIVE, scope=scope)
    assert repaired.run.is_finite
    assert is_cured(traces[0], repaired.trace)
    # 0.5 stands for each element that was not finite.
    assert repaired.run.loss == 3.0
    names = [[e.op for e in trace.events[:8]] for trace in (traces[0], repaired.trace)]
    assert names[0] == names[1]


def test_repairs_in_a_later_step():
    """The events are those of the step that failed, though its trace may begin before."""

    class Noting(Scale):
        def __init__(self):
            super().__init__()
            self.register_buffer("unread", torch.zeros(3))

        def forward(self, x):
            with torch.no_grad():
                self.unread.copy_((x[0] - 9).log())  # nobody reads it
            return super().forward(x)

    def loss_fn(m, x):
        y = m(x)
        if x.sum() < 8:
            return y.sum()
        return torch.where(y > 100, (y - 9).log(), (y - 80).sqrt()).sum() * 1  # picked

    model = Noting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [(X,), (X,), (X * 2,)]
    subject = Subject(model, batches, loss_fn, optimizer=optimizer)
    report = hunt(subject, precisions=("native",), steps=3)
    (found,) = report.culprits
    assert (found.op, found.step, report.batch) == ("aten::sqrt", 2, 2)
    assert "1 other birth on the way to it does not matter" in " ".join(report.notes)
