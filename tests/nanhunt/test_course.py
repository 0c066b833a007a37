"""Several steps in a row: the steps of a plain loop, to the bit, up to the first that fails."""

import inspect
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from nanhunt.errors import SubjectError, UsageError
from nanhunt.hunting import hunt
from nanhunt.replay import replay, take_steps
from nanhunt.report.short import tell
from nanhunt.snapshot import preserved
from nanhunt.subject import Subject
from nanhunt.variants import NATIVE, VARIANTS

INF, NAN = math.inf, math.nan
X = torch.tensor([[1.0, 2.0, 3.0], [0.5, 1.0, 2.0], [1.5, 0.5, 1.0], [2.0, 1.0, 0.5]])


class Scale(nn.Module):
    """Multiplies by a weight."""

    def __init__(self, *values):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(values or (1.0, 1.0, 1.0)))

    def forward(self, x):
        return self.weight * x


def make(loss_fn, batches=(X,), model=None, lr=0.1, **options):
    """A subject with a plain optimizer."""
    model = model or Scale()
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=lr)
    return Subject(model, batches, loss_fn, optimizer=optimizer, **options)


def find(loss_fn, batches=(X,), *, steps=4, batch=0, **options):
    """The report of a native hunt over several steps."""
    subject = make(loss_fn, batches, **options)
    return hunt(subject, precisions=("native",), steps=steps, batch=batch)


def mark(found):
    """The mark at the end of the line that was named."""
    assert found.file.endswith("test_course.py")
    line = inspect.getsource(inspect.getmodule(mark)).splitlines()[found.line - 1]
    return line.rpartition("# ")[2]


def take(subject, first, count):
    """Take steps without a word."""
    return take_steps(subject, first, count, lambda _: None)


def square(m, x):
    return m(x).square().mean()


# -- a whole training: dropout, running statistics, Adam's moments, random batches -----------------


def trained(loss_fn=square, **options):
    """A subject whose every part changes with each step."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)

    def batches(index):
        noise = torch.from_numpy(np.random.standard_normal((4, 3)))  # noqa: NPY002
        return X + index + random.random() + noise.float() + torch.randn(4, 3)  # noqa: S311

    return Subject(model, batches, loss_fn, optimizer=optimizer, seed=11, **options)


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.detach().numpy().tobytes()


def held(subject):
    """Every tensor that a step may change, by name."""
    model, optimizer = subject.model, subject.optimizer
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    named |= {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    for number, values in enumerate(optimizer.state.values()):
        tensors = {key: v for key, v in values.items() if isinstance(v, torch.Tensor)}
        named |= {f"{key} {number}": tensor for key, tensor in tensors.items()}
    return named


def picture(subject):
    """Identity and bits of the subject, and the random generators."""
    return (
        {name: (id(tensor), bits(tensor)) for name, tensor in held(subject).items()},
        [module.training for module in subject.model.modules()],
        [{**group, "params": None} for group in subject.optimizer.param_groups],
        subject.scaler and subject.scaler.state_dict(),
        random.getstate(),
        np.random.get_state()[1].tobytes(),  # noqa: NPY002
        bits(torch.get_rng_state()),
        torch.is_grad_enabled(),
    )


def loop(subject, first, count):
    """The same steps as anyone would write them; the losses and the norms of all gradients."""
    losses = []
    for step in range(first, first + count):
        random.seed(subject.seed + step)
        np.random.seed(subject.seed + step)  # noqa: NPY002
        torch.manual_seed(subject.seed + step)
        x = subject.batches(step)
        random.seed(subject.seed + step)
        np.random.seed(subject.seed + step)  # noqa: NPY002
        torch.manual_seed(subject.seed + step)
        subject.optimizer.zero_grad()
        loss = subject.loss_fn(subject.model, x)
        loss.backward()
        norm = math.hypot(*(float(p.grad.norm()) for p in subject.model.parameters()))
        losses.append((float(loss.detach()), pytest.approx(norm)))
        subject.optimizer.step()
    return losses


def own_step(model, batch, loss_fn, optimizer, scaler, step):
    """The plain step, written as a subject's own."""
    optimizer.zero_grad()
    loss = loss_fn(model, batch)
    yield "loss", loss
    loss.backward()
    yield "grads", loss
    optimizer.step()
    yield "step", loss


@pytest.mark.parametrize("train_step", [None, own_step])
def test_steps_are_those_of_a_plain_loop(train_step):
    """To the bit: parameters, statistics and moments; the last step is not taken for good."""
    course_of, loop_of = trained(train_step=train_step), trained()
    course = take(course_of, 2, 5)
    expected = loop(loop_of, 2, 5)
    assert [(p.step, p.loss, p.gradient) for p in course.pace] == [
        (step, *numbers) for step, numbers in enumerate(expected, start=2)
    ]
    assert (course.replay, course.subject.step) == (None, 6)
    before_the_last = trained()
    loop(before_the_last, 2, 4)
    ours, theirs = held(course_of), held(before_the_last)
    assert ours.keys() == theirs.keys()
    assert {n: bits(t) for n, t in ours.items()} == {n: bits(t) for n, t in theirs.items()}


def test_largest_parameter_is_that_before_the_step():
    """It is told how large things were when the step began."""
    subject = make(lambda m, x: m(x).sum(), model=Scale(1.0, -4.0, 2.0), lr=0.0)
    assert [p.largest for p in take(subject, 0, 2).pace] == [4.0, 4.0]


@pytest.mark.parametrize("scaled", [False, True])
def test_everything_is_put_back(scaled):
    """Identity and bits, after a healthy course, one that fails, and another precision."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
    subject = trained(scaler=scaler)
    loop(subject, 0, 2)  # moments, gradients and statistics are there already
    before = picture(subject)
    assert hunt(subject, precisions=("native", "fp64"), steps=4).verdict == "healthy"
    assert picture(subject) == before

    failing = trained(lambda m, x: (m(x) * (0 if x.mean() > 4 else 1)).pow(2).sum(1).sqrt().mean())
    loop(failing, 0, 2)
    before = picture(failing)
    report = hunt(failing, precisions=("native", "fp64"), steps=9)
    assert (report.verdict, report.culprits[0].op) == ("culprit", "aten::sqrt")
    assert 1 < len(report.pace) < 9
    assert picture(failing) == before


def test_everything_is_put_back_when_a_step_raises():
    """Also the steps before it, which had been taken."""

    def batches(index):
        if index == 2:
            raise KeyError("no such row")
        return X

    def loss_fn(m, x):
        if x.mean() > 4:
            raise ArithmeticError("enough")
        return m(x).square().mean()

    subject = trained(loss_fn)
    before = picture(subject)
    with pytest.raises(SubjectError, match=r"^step \d raised ArithmeticError: enough \(test_cou"):
        hunt(subject, steps=9)
    assert picture(subject) == before

    subject = make(square, batches)
    before = picture(subject)
    with pytest.raises(SubjectError, match="batch 2 is out of range: 'no such row'"):
        hunt(subject, steps=9)
    assert picture(subject) == before


def test_gradients_of_an_earlier_training_are_no_part_of_a_step():
    """Each step begins without them, as after `zero_grad`."""
    subject = make(square)
    subject.model.weight.grad = torch.full((3,), INF)
    assert hunt(subject, precisions=("native",), steps=2).verdict == "healthy"
    assert subject.model.weight.grad.isinf().all()


# -- the step that fails ---------------------------------------------------------------------------


def test_healthy_course():
    """All finite: the report is of the last step, and tells the pace of all."""
    report = find(square, steps=3)
    assert (report.verdict, report.culprits, report.batch) == ("healthy", (), 2)
    assert report.steps == 3
    assert [(p.step, p.skipped) for p in report.pace] == [(0, False), (1, False), (2, False)]
    assert report.pace[0].loss > report.pace[1].loss > report.pace[2].loss > 0
    assert report.runs[0].loss == report.pace[-1].loss
    assert report.deterministic


def test_failing_step_is_found():
    """By its number, with the steps before it taken; the later ones are not."""

    def loss_fn(m, x):
        return (m(x) - 9).relu().mean() + x.min().sub(m.weight.sum() * 0).sqrt().sum()  # root

    batches = [X, X, X * 2, X * 0 - 1, X]
    report = find(loss_fn, batches, steps=5)
    assert (report.verdict, report.batch, len(report.pace), report.steps) == ("culprit", 3, 4, 5)
    (found,) = report.culprits
    assert (found.phase, found.op, found.step, mark(found)) == ("forward", "aten::sqrt", 3, "root")
    assert found.where is None
    assert [math.isnan(p.loss) for p in report.pace] == [False, False, False, True]
    assert find(loss_fn, batches, steps=2, batch=2).batch == 3
    assert find(loss_fn, batches, steps=3).verdict == "healthy"


def test_only_the_steps_before_make_it_fail():
    """The same batch is finite from the parameters as given; other precisions are of that step."""

    def loss_fn(m, x):
        return m(x).sum(1).log().mean() * -1 + m(x).sum()  # runs into the pole

    subject = make(loss_fn, lr=0.5)
    assert hunt(subject, precisions=("native",)).verdict == "healthy"
    report = hunt(subject, precisions=("native", "fp64"), steps=9)
    (found,) = report.culprits
    assert (found.op, mark(found), found.step) == ("aten::log", "runs into the pole", report.batch)
    assert 0 < report.batch < 9
    assert [run.variant for run in report.runs] == ["native", "fp64"]
    assert not any(run.is_finite for run in report.runs)


def test_optimizer_step_that_fails():
    """A step is one to the parameters that it leaves, and not to the loss of the next."""
    model = Scale()
    optimizer = torch.optim.Adam(model.parameters(), eps=0.0)
    batches = [X, X * torch.tensor([0.0, 1.0, 1.0]), X]
    report = find(lambda m, x: m(x).sum(), batches, model=model, optimizer=optimizer)
    assert report.verdict == "healthy"  # the moments of the first step are in all of them
    report = find(lambda m, x: m(x).sum(), batches[1:], model=model, optimizer=optimizer)
    (found,) = report.culprits
    assert (found.phase, found.cause, found.step) == ("optimizer", "optimizer_arithmetic", 0)
    assert (report.batch, len(report.pace)) == (0, 1)


def test_bad_batch():
    """A batch that was not finite is data, and is named."""
    batches = [X, X, X.clone(), X]
    batches[2][1, 1] = NAN
    report = find(square, batches)
    (found,) = report.culprits
    assert (found.phase, found.cause, found.where) == ("data", "bad_data", "batch")
    assert (report.batch, len(report.pace)) == (2, 3)
    pairs = [(x, X) for x in batches]
    (found,) = find(lambda m, x, y: (m(x) - y).square().mean(), pairs).culprits
    assert found.where == "batch[0]"
    assert found.evidence == ("batch[0] [4, 3] holds 1 NaN before the step, first at index [1, 1]",)
    pairs = [(X, x) for x in batches]
    (found,) = find(lambda m, x, y: (m(x) - y).square().mean(), pairs).culprits
    assert found.where == "batch[1]"


def test_divergence():
    """A learning rate that is far too large is told by how the parameters grew."""
    report = find(square, steps=60, lr=50.0)
    (found,) = report.culprits
    assert found.cause == "divergence"
    sizes = [p.largest for p in report.pace]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 1e6 * sizes[0]
    assert report.batch == len(report.pace) - 1 > 1
    assert not math.isfinite(report.pace[-1].loss + report.pace[-1].gradient)


def test_divergence_is_one_fault():
    """With the loss repaired a backward overflows too: the parameters are as large there."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 1)

        def forward(self, x):
            h = torch.relu(self.a(x))
            h = torch.relu(self.b(h)) + h
            return self.c(h)

    model = Residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0, momentum=0.9)
    batch = torch.randn(8, 6), torch.randn(8, 1)

    def loss_fn(m, x, y):
        error = m(x) - y
        return (error * error).mean()

    subject = Subject(model, [batch], loss_fn, optimizer=optimizer)
    report = hunt(subject, precisions=("native",), steps=12)
    assert [found.cause for found in report.culprits] == ["divergence"]


def test_batches_begin_again_at_the_end():
    """A sequence is an epoch; a function is asked for each number."""
    asked = []

    def batches(index):
        asked.append(index)
        return X

    report = find(square, [X, X * 2], steps=5, lr=0.0)
    losses = [p.loss for p in report.pace]
    assert losses == [losses[0], losses[1], losses[0], losses[1], losses[0]]
    assert losses[0] != losses[1]
    find(square, batches, steps=3, batch=4)
    assert asked == [4, 5, 6]
    with pytest.raises(SubjectError, match="batch 0 is out of range: the subject has no batches"):
        find(square, [])
    with pytest.raises(SubjectError, match="batch -1 is out of range: the subject has 1"):
        find(square, batch=-1)


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_refused(steps):
    """In one sentence."""
    with pytest.raises(UsageError) as caught:
        find(square, steps=steps)
    assert str(caught.value) == f"so many steps cannot be taken: {steps}; at least 1"


def test_one_step_has_no_pace():
    """It is the step as given, of which nothing is taken for good."""
    report = find(square, steps=1)
    assert (report.steps, report.pace, report.batch) == (1, (), 0)


# -- a scaler --------------------------------------------------------------------------------------


def halved(factor):
    """A loss whose backward passes FP16 once, with that factor."""
    return lambda m, x: (m(x).half().float() * factor).sum()


def scaler(scale=65536.0):
    return torch.amp.GradScaler("cpu", init_scale=scale)


def test_healthy_skip():
    """Gradients that overflow at a scale and fit a smaller one: the scaler skips, and goes on."""
    subject = make(halved(1.0), scaler=scaler(), lr=0.01)
    course = take(subject, 0, 4)
    assert course.replay is None
    assert [p.skipped for p in course.pace] == [True, False, False, False]
    assert [p.largest for p in course.pace[:2]] == [1.0, 1.0]
    assert course.pace[2].largest < 1.0
    assert subject.scaler.get_scale() == 32768.0
    report = find(halved(1.0), scaler=scaler())
    assert (report.verdict, len(report.pace)) == ("healthy", 4)


def test_skips_in_a_row():
    """Until it has found its scale; also where the last step is one of them."""
    report = find(halved(16.0), scaler=scaler(), steps=7)
    assert [p.skipped for p in report.pace] == [True] * 5 + [False] * 2
    report = find(halved(16.0), scaler=scaler(), steps=3)
    assert report.verdict == "healthy"
    assert [p.skipped for p in report.pace] == [True] * 3


def test_no_scale_fits():
    """What is not finite at scale 1 either is a fault, and not the scaler's business."""
    report = find(
        lambda m, x: halved(1.0 if m.weight[0] == 1 else 70_000.0)(m, x), scaler=scaler(2)
    )
    assert (report.verdict, report.batch) == ("culprit", 1)
    (found,) = report.culprits
    assert (found.phase, found.dtype, found.step) == ("backward", "float16", 1)
    assert [p.skipped for p in report.pace] == [False, False]


def test_nonfinite_loss_is_no_skip():
    """No scale mends a loss."""
    report = find(lambda m, x: (m(x) - 9).sqrt().sum(), scaler=scaler(2))
    assert (report.verdict, report.batch, report.pace[0].skipped) == ("culprit", 0, False)


# -- what an earlier step left ---------------------------------------------------------------------


class Memory(Scale):
    """Reads what it noted the step before."""

    def __init__(self):
        super().__init__()
        self.register_buffer("noted", torch.zeros(()))

    def forward(self, x):
        y = super().forward(x) + self.noted
        with torch.no_grad():
            self.noted.copy_((x.min() - 0.2).log())  # noted too late
        return y


def test_buffer_that_an_earlier_step_poisoned():
    """The culprit ran one step before the one that failed."""
    report = find(square, [X, X, X * 0, X, X], model=Memory(), steps=5)
    (found,) = report.culprits
    assert (found.op, found.phase, mark(found)) == ("aten::log", "forward", "noted too late")
    assert (found.step, report.batch, len(report.pace)) == (2, 3, 4)
    assert found.where is None


def test_mask_that_the_first_step_made():
    """An infinity that was asked for, once for all steps, is as harmless as in one of them."""

    class Masked(Scale):
        mask = None

        def forward(self, x):
            if self.mask is None:
                self.mask = torch.zeros(3).masked_fill(torch.tensor([True, False, False]), -INF)
            return super().forward(x) * (x + self.mask).softmax(-1)

    assert find(square, model=Masked()).verdict == "healthy"

    def loss_fn(m, x):
        y = m(x)
        if x.sum() < 20:
            return y.square().sum()
        return torch.where(y > 99, (y - 99).log(), (y - 98).sqrt()).sum()  # the last

    (found,) = find(loss_fn, [X, X, X * 2], model=Masked()).culprits
    assert (found.op, found.step, mark(found)) == ("aten::sqrt", 2, "the last")


def test_parameter_that_only_the_optimizer_holds():
    """A weight of the loss that is trained along: its own step leaves it non-finite."""
    model, weight = Scale(), nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([*model.parameters(), weight], lr=0.1)

    def loss_fn(m, x):
        return m(x).square().mean() + weight.sqrt()  # weighed

    (found,) = find(loss_fn, model=model, optimizer=optimizer).culprits
    assert (found.op, found.step, mark(found)) == ("aten::sqrt", 0, "weighed")
    assert (weight.item(), weight.grad) == (0.0, None)


def test_poisoned_buffer_that_is_written_anew_is_no_fault():
    """What nobody read was harmless, in later steps as well."""

    class Forgets(Memory):
        def forward(self, x):
            y = super().forward(x)
            with torch.no_grad():
                self.noted.zero_()
            return y

    assert find(square, [X, X * 0, X], model=Forgets()).verdict == "healthy"


def test_buffer_that_was_poisoned_before():
    """Nothing of the course made it."""
    model = Memory()
    model.noted.fill_(NAN)
    (found,) = find(square, model=model).culprits
    assert (found.phase, found.where) == ("data", "buffer:noted")


def test_parameter_that_was_poisoned_before():
    """It is named as it is in the model."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    with torch.no_grad():
        model[1].weight[0, 1] = INF
    (found,) = find(square, model=model).culprits
    assert (found.phase, found.where, found.module) == ("data", "param:1.weight", "1")


def test_average_that_the_step_holds():
    """A tensor of the loop's own, which no module knows of."""
    average = {"loss": torch.tensor(1.0)}

    def step(model, batch, loss_fn, optimizer, scaler, step):
        optimizer.zero_grad()
        loss = loss_fn(model, batch) * average["loss"].detach()
        yield "loss", loss
        loss.backward()
        yield "grads", loss
        optimizer.step()
        with torch.no_grad():
            average["loss"] = 0.9 * average["loss"] + 0.1 * (batch.min() - 0.2).log()  # averaged
        yield "step", loss

    report = find(square, [X, X, X * 0, X, X], train_step=step, steps=5)
    (found,) = report.culprits
    assert (found.op, mark(found), found.step) == ("aten::log", "averaged", 2)
    assert (report.batch, len(report.pace)) == (3, 4)


# -- a step of the subject's own -------------------------------------------------------------------


def hunted(step, loss_fn=square, *, steps=1, precisions=("native",), ablate=(), **options):
    """The report of a step that the subject takes itself."""
    subject = make(loss_fn, train_step=step, **options)
    return hunt(subject, precisions=precisions, ablate=ablate, steps=steps)


def test_own_step_is_healthy_and_faulty():
    """Its forward, its backward, its optimizer."""
    assert hunted(own_step).verdict == "healthy"
    (found,) = hunted(own_step, lambda m, x: (m(x) - 9).log().mean()).culprits  # logged
    assert (found.phase, found.op, mark(found)) == ("forward", "aten::log", "logged")
    (found,) = hunted(own_step, lambda m, x: (m(x) * 0).sqrt().mean()).culprits  # rooted
    assert (found.phase, found.op, mark(found)) == ("backward", "aten::sqrt", "rooted")
    model = Scale()
    adam = torch.optim.Adam(model.parameters(), eps=0.0)
    report = hunted(own_step, lambda m, x: m(x)[:, 1:].sum(), model=model, optimizer=adam)
    (found,) = report.culprits
    assert (found.phase, found.cause) == ("optimizer", "optimizer_arithmetic")
    assert report.runs[0].stepped_nonfinite == 1


def test_own_step_is_told_its_number():
    """And is given the optimizer and the scaler of the subject."""
    seen = []

    def step(model, batch, loss_fn, optimizer, scaler, step):
        seen.append((step, optimizer, scaler))
        yield from own_step(model, batch, loss_fn, optimizer, scaler, step)

    subject = make(square, train_step=step, scaler=scaler(2))
    take(subject, 3, 2)
    assert seen == [(3, subject.optimizer, subject.scaler), (4, subject.optimizer, subject.scaler)]


def micro(model, batch, loss_fn, optimizer, scaler, step):
    """Gradients accumulated over the samples."""
    optimizer.zero_grad()
    for part in batch.split(1):
        loss = loss_fn(model, part) / len(batch)
        yield "loss", loss
        loss.backward()
    yield "grads", loss
    optimizer.step()
    yield "step", loss


def test_micro_batches():
    """Several losses, each of which must be finite; the third one is not."""
    assert hunted(micro, steps=3).verdict == "healthy"
    batch = X.clone()
    batch[2] = 0
    report = hunted(micro, lambda m, x: m(x).square().sum().sqrt(), batches=[batch])  # third
    (found,) = report.culprits
    assert (found.phase, found.op, mark(found)) == ("backward", "aten::sqrt", "third")
    report = hunted(micro, lambda m, x: m(x).sum().log(), batches=[batch])  # pole
    (found,) = report.culprits
    assert (found.phase, found.op, mark(found)) == ("forward", "aten::log", "pole")


def test_later_loss_does_not_hide_behind_an_earlier_backward():
    """Sinks count in the order in which they were met: here the gradients of the first part."""

    def step(model, batch, loss_fn, optimizer, scaler, step):
        for part in (batch[:2], batch[2:]):
            optimizer.zero_grad()
            loss = loss_fn(model, part)
            yield "loss", loss
            loss.backward()
            yield "grads", loss
            optimizer.step()
            yield "step", loss

    def loss_fn(m, x):
        return (m(x) * 0).sqrt().sum() + m(x).sum()  # the very first

    report = hunted(step, loss_fn)
    (found,) = report.culprits
    assert (found.phase, found.op, mark(found)) == ("backward", "aten::sqrt", "the very first")


def test_clipping_is_not_blamed():
    """The norm of an infinite gradient is the clipping's affair, the gradient is not."""

    def step(model, batch, loss_fn, optimizer, scaler, step):
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        yield "loss", loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        yield "grads", loss
        optimizer.step()
        yield "step", loss

    def clipped_late(model, batch, loss_fn, optimizer, scaler, step):
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        yield "loss", loss
        loss.backward()
        yield "grads", loss
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield "step", loss

    def loss_fn(m, x):
        return (m(x)[:, 0] * 0).sqrt().sum() + m(x).sum()  # infinite slope

    for each in (step, clipped_late):
        assert hunted(each, steps=2).verdict == "healthy"
        (found,) = hunted(each, loss_fn).culprits
        assert (found.phase, found.op) == ("backward", "aten::sqrt")
        assert mark(found) == "infinite slope"


def test_update_by_hand():
    """No optimizer: the parameters are written to, and that is what counts."""

    def step(model, batch, loss_fn, optimizer, scaler, step):
        model.zero_grad()
        loss = loss_fn(model, batch)
        yield "loss", loss
        loss.backward()
        yield "grads", loss
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(rate * parameter.grad / parameter.grad.norm())  # by hand
        yield "step", loss

    def report(loss_fn):
        subject = Subject(Scale(), [X], loss_fn, train_step=step)
        return hunt(subject, precisions=("native",), steps=3)

    rate = 0.01
    assert report(square).verdict == "healthy"
    found = report(lambda m, x: (m(x) * 0).sum())
    (culprit,) = found.culprits
    assert (culprit.op, mark(culprit)) == ("aten::div", "by hand")
    assert found.runs[0].stepped_nonfinite == 1


def test_two_optimizers():
    """One of them is the subject's, the other the step's own."""
    model = nn.ModuleDict({"one": Scale(), "two": Scale()})
    other = torch.optim.SGD(model["two"].parameters(), lr=0.1)

    def step(model, batch, loss_fn, optimizer, scaler, step):
        for name, each in (("one", optimizer), ("two", other)):
            each.zero_grad()
            loss = loss_fn(model[name], batch)
            yield "loss", loss
            loss.backward()
            yield "grads", loss
            each.step()
            yield "step", loss

    def loss_fn(m, x):
        y = m(x)
        return y.sum() if m is model["one"] else (y - y).norm() + (y * 0).sqrt().sum()  # the second

    def report(loss_fn):
        optimizer = torch.optim.SGD(model["one"].parameters(), lr=0.1)
        subject = Subject(model, [X], loss_fn, optimizer=optimizer, train_step=step)
        return hunt(subject, precisions=("native",), steps=2)

    assert report(square).verdict == "healthy"
    before = {name: bits(p) for name, p in model.named_parameters()}
    found = report(loss_fn)
    (culprit,) = found.culprits
    assert (culprit.phase, culprit.op, mark(culprit)) == ("backward", "aten::sqrt", "the second")
    assert culprit.poisoned == (("two", 1, 1),)
    assert {name: bits(p) for name, p in model.named_parameters()} == before


# -- ablations and precisions of such a step -------------------------------------------------------


def terms(m, x):
    y = m(x)
    return {"fit": y.square().mean(), "spread": (y - y).sqrt().sum()}


def summed(model, batch, loss_fn, optimizer, scaler, step):
    """A step that adds the named terms up itself, or is given the loss."""
    optimizer.zero_grad()
    value = loss_fn(model, batch)
    loss = sum(value.values()) if isinstance(value, dict) else value
    yield "loss", loss
    loss.backward()
    yield "grads", loss
    optimizer.step()
    yield "step", loss


def test_terms_of_an_own_step():
    """A term is taken out of what the step is given as its loss."""
    report = hunted(summed, terms)
    (found,) = report.culprits
    assert (found.op, found.terms) == ("aten::sqrt", ("spread",))
    without = {a.names: a.cures for a in report.ablations if a.mode == "without"}
    assert without == {("spread",): True}
    alone = {a.names: a.finite for a in report.ablations if a.mode == "alone"}
    assert alone == {("spread",): False}
    report = hunted(summed, terms, ablate=("all",), steps=2)
    assert [(a.names, a.finite) for a in report.ablations if a.mode == "without"] == [
        (("fit",), False),
        (("spread",), True),
    ]


def test_weights_of_an_own_step():
    """A weight is set in the live objective, and is back afterwards."""
    weights = {"lam": 0.5}

    def loss_fn(m, x):
        y = m(x)
        spread = (1 + (y - y).sqrt().sum()) * weights["lam"] if weights["lam"] else 0.0
        return y.square().mean() + spread

    options = {"weights": weights, "reweight": weights.__setitem__}
    report = hunted(own_step, loss_fn, ablate=("lam",), steps=2, **options)
    assert [(a.names, a.cures, a.took_effect) for a in report.ablations] == [(("lam",), True, True)]
    assert weights == {"lam": 0.5}


def test_precisions_of_an_own_step():
    """In FP64, and under autocast, at the scale of the step's own scaler."""
    subject = make(square, train_step=own_step)
    for name in VARIANTS:
        assert replay(subject, X, VARIANTS[name]).run.is_finite, name
    wide = replay(subject, X, VARIANTS["fp64"])
    assert {e.dtype for e in wide.trace.events if e.op == "aten::mul"} == {"float64"}

    def loss_fn(m, x):
        return (m(x) * 1e30 * 1e30).mean() * 1e-30

    report = hunted(own_step, loss_fn, precisions=("native", "fp64"))
    assert [run.is_finite for run in report.runs] == [False, True]
    assert report.precision == "a fault of rounding or range: gone in fp64"


def scaled_step(model, batch, loss_fn, optimizer, scaler, step):
    """As the manual of GradScaler has it, with clipping."""
    optimizer.zero_grad()
    loss = loss_fn(model, batch)
    yield "loss", loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    yield "grads", loss
    scaler.step(optimizer)
    scaler.update()
    yield "step", loss


def test_scaler_of_an_own_step():
    """A skip that is healthy goes on; a fault that no scale mends is one."""
    subject = make(halved(1.0), train_step=scaled_step, scaler=scaler(), lr=0.01)
    assert [p.skipped for p in take(subject, 0, 3).pace] == [True, False, False]
    assert subject.scaler.get_scale() == 32768.0
    report = hunted(scaled_step, halved(70_000.0), scaler=scaler(), steps=3)
    assert (report.verdict, report.batch) == ("culprit", 0)
    assert report.culprits[0].dtype == "float16"


def unscaled_late(model, batch, loss_fn, optimizer, scaler, step):
    """Its gradients are looked at while they are scaled."""
    optimizer.zero_grad()
    loss = loss_fn(model, batch)
    yield "loss", loss
    scaler.scale(loss).backward()
    yield "grads", loss
    scaler.step(optimizer)
    scaler.update()
    yield "step", loss


@pytest.mark.parametrize("step", [scaled_step, unscaled_late])
def test_fault_that_a_course_meets_at_a_scale(step):
    """It is replayed at 1, to the bit, and a fix is compared at one scale."""

    def loss_fn(m, x):
        y = m(x)
        return (y[:, 0] * (x[:, 0] < 9)).sqrt().sum() + y.square().mean()

    late = X.clone()
    late[1, 0] = 9.0
    report = hunted(step, loss_fn, batches=[X, late], scaler=scaler(8), steps=3)
    (found,) = report.culprits
    assert (found.op, found.step) == ("aten::sqrt", 1)
    assert report.deterministic
    assert next(trial.finite for trial in report.trials if trial.is_neutralising)
    assert any(trial.is_proven for trial in report.trials)


# -- what such a step may not do -------------------------------------------------------------------


def yielding(*stations):
    """A step that yields these."""

    def step(model, batch, loss_fn, optimizer, scaler, step):
        loss = loss_fn(model, batch)
        loss.backward()
        for name in stations:
            yield name, loss

    return step


def leaving_out(*left):
    """The plain step, which leaves some steps out without a word."""

    def step(model, batch, loss_fn, optimizer, scaler, step):
        if step not in left:
            yield from own_step(model, batch, loss_fn, optimizer, scaler, step)

    return step


def test_step_that_the_program_leaves_out():
    """It is passed over; the last one must be there, since it is what is replayed."""
    batches = [X, X * NAN, X, X * NAN]
    report = hunt(make(square, batches, train_step=leaving_out(1)), precisions=(), steps=3)
    assert report.verdict == "healthy"
    assert [math.isnan(pace.loss) for pace in report.pace] == [False, True, False]
    assert [pace.skipped for pace in report.pace] == [False, True, False]
    report = hunt(make(square, batches, train_step=leaving_out(1)), precisions=(), steps=4)
    (found,) = report.culprits
    assert (found.phase, found.where, report.pace[-1].step) == ("data", "batch", 3)
    with pytest.raises(SubjectError, match="it yielded nothing"):
        hunt(make(square, batches, train_step=leaving_out(1)), precisions=(), steps=2)


def test_what_a_step_spoils_that_is_left_out():
    """A statistic that it has poisoned shows in the next step that is taken."""
    model = nn.BatchNorm1d(3, affine=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(model, batch, loss_fn, optimizer, scaler, step):
        loss = loss_fn(model, batch)
        if not torch.isfinite(loss):
            return
        model.eval()
        yield from own_step(model, batch, loss_fn, optimizer, scaler, step)
        model.train()

    def loss_fn(m, x):
        return m(x.sub(9).sqrt() if x.amax() > 9 else x).square().mean()  # spoils

    subject = make(loss_fn, [X, X * 7, X], model=model, optimizer=optimizer, train_step=step)
    (found,) = hunt(subject, precisions=(), steps=3).culprits
    assert hunt(subject, precisions=(), steps=1).verdict == "healthy"
    assert (found.op, found.step, mark(found)) == ("aten::sqrt", 1, "spoils")


def test_step_that_ends_at_a_loss_that_is_not_finite():
    """Programs do so to go on; a loss that is finite has a backward."""

    def careful(model, batch, loss_fn, optimizer, scaler, step):
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        yield "loss", loss
        if torch.isfinite(loss):
            loss.backward()
            yield "grads", loss
            optimizer.step()

    assert hunted(careful, steps=2).verdict == "healthy"
    report = hunted(careful, lambda m, x: (m(x) - 9).log().mean())  # careful log
    (found,) = report.culprits
    assert (found.phase, found.op, mark(found)) == ("forward", "aten::log", "careful log")
    asked = next(a for a in report.diagnosis if a.question == "without_gradient")
    assert asked.answer == "cannot tell"


def test_loss_that_is_shown_after_its_backward_needs_no_graph():
    """A sum over micro-batches is detached, as a rule."""

    def summing(model, batch, loss_fn, optimizer, scaler, step):
        optimizer.zero_grad()
        total = 0.0
        for part in batch.split(1):
            loss = loss_fn(model, part)
            loss.backward()
            total = total + loss.detach()
        yield "loss", total
        yield "grads", total
        optimizer.step()
        yield "step", total

    assert hunted(summing, steps=2).verdict == "healthy"
    batch = X.clone()
    batch[2] = 0
    (found,) = hunted(summing, lambda m, x: m(x).square().sum().sqrt(), batches=[batch]).culprits
    assert (found.phase, found.op) == ("backward", "aten::sqrt")


def test_gradients_that_are_worked_on_by_hand():
    """What divides by their norm is no part of the forward, and no formula of the backward."""

    def normalised(model, batch, loss_fn, optimizer, scaler, step):
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        yield "loss", loss
        loss.backward()
        for parameter in model.parameters():
            parameter.grad.div_(parameter.grad.norm())  # normalised
        yield "grads", loss
        optimizer.step()
        yield "step", loss

    assert hunted(normalised, steps=2).verdict == "healthy"
    report = hunted(normalised, lambda m, x: (m(x) * 0).sum())
    (found,) = report.culprits
    assert (found.phase, found.op, mark(found)) == ("backward", "aten::div_", "normalised")
    assert found.is_on_gradients
    assert found.cause == "zero_denominator_in_backward"
    assert "the formula of its backward" not in found.explanation
    assert "div_, on the gradients" in tell(report)
    # A forward that fails is still one, and so is the node of a backward.
    (found,) = hunted(normalised, lambda m, x: (m(x) - 9).log().mean()).culprits
    assert (found.phase, found.is_on_gradients) == ("forward", False)
    (found,) = hunted(normalised, lambda m, x: (m(x) * 0).sqrt().sum()).culprits
    assert (found.phase, found.op, found.is_on_gradients) == ("backward", "aten::sqrt", False)


def vector(model, batch, loss_fn, optimizer, scaler, step):
    yield "loss", model(batch)


def detached(model, batch, loss_fn, optimizer, scaler, step):
    yield "loss", loss_fn(model, batch).detach()


def number(model, batch, loss_fn, optimizer, scaler, step):
    yield "loss", loss_fn(model, batch).item()


def raising(model, batch, loss_fn, optimizer, scaler, step):
    yield "loss", loss_fn(model, batch)
    raise LookupError("lost\nmy way")


def leaving(model, batch, loss_fn, optimizer, scaler, step):
    raise SystemExit(3)
    yield


def plain(model, batch, loss_fn, optimizer, scaler, step):
    """No generator."""
    loss_fn(model, batch).backward()


def few_arguments(model, batch):
    yield "loss", model(batch).sum()


PROTOCOL = "train_step is to yield ('loss', loss) and ('grads', loss); it yielded "
MISTAKES = [
    (yielding("loss", "gradients"), "the stations that train_step yields are loss, grads, step; "),
    (yielding(), PROTOCOL + "nothing"),
    (yielding("loss"), PROTOCOL + "'loss'"),
    (yielding("grads", "step"), PROTOCOL + "'grads', 'step'"),
    (vector, "the loss is to be a scalar; got shape [4, 3]"),
    (detached, "the loss has no graph: "),
    (number, "loss_fn is to return a scalar tensor or a mapping of terms; got float"),
    (raising, "raised LookupError: lost my way (test_course.py:"),
    (leaving, "raised SystemExit: 3 (test_course.py:"),
    (plain, "raised TypeError: "),
    (few_arguments, "raised TypeError: few_arguments() takes 2 positional arguments but 6 were"),
]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("step", "sentence"), MISTAKES)
def test_mistakes_in_an_own_step(step, sentence, steps):
    """One sentence, and the subject is as it was."""
    subject = make(square, train_step=step)
    before = picture(subject)
    with pytest.raises(SubjectError) as caught:
        hunt(subject, precisions=("native",), steps=steps)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert picture(subject) == before


def test_own_step_is_closed_when_it_is_left():
    """What it holds open is given back, whatever a station showed."""
    closed = []

    def step(model, batch, loss_fn, optimizer, scaler, step):
        try:
            yield "loss", loss_fn(model, batch).detach()
        finally:
            closed.append(step)

    with pytest.raises(SubjectError):
        hunted(step)
    assert closed == [0]


def test_preserved_around_a_course():
    """Who takes steps by themselves keeps the subject by `preserved`."""
    subject = trained()
    before = picture(subject)
    with preserved(subject):
        course = take(subject, 0, 3)
        assert replay(course.subject, course.batch, NATIVE, scope=None).run.loss == (
            course.pace[-1].loss
        )
    assert picture(subject) == before
