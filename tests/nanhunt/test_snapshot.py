"""Snapshot: everything that a step may change is put back, bit by bit and by identity."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from nanhunt.generators import seed_generators
from nanhunt.replay import replay
from nanhunt.snapshot import preserved
from nanhunt.subject import Subject
from nanhunt.variants import VARIANTS


class Norms(nn.Module):
    """Buffers that change in place, and one that is replaced."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("late", None)
        self.drop = nn.Dropout()

    def forward(self, x):
        self.seen = self.seen + 1
        self.late = torch.ones(2)
        return self.drop(self.norm(self.linear(x)))


def bits(tensor):
    return (tensor.dtype, tuple(tensor.stride()), tensor.detach().cpu().numpy().tobytes())


def picture(subject):
    """Identity and bits of all that must come back."""
    model, optimizer = subject.model, subject.optimizer
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    named |= {f"grad of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    if optimizer is not None:
        for number, values in enumerate(optimizer.state.values()):
            for key, value in values.items():
                if isinstance(value, torch.Tensor):
                    named[f"{key} {number}"] = value
    return {
        "tensors": {name: (id(t), t.data_ptr(), bits(t)) for name, t in named.items()},
        "modes": [module.training for module in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
        "names": [list(m._parameters) + list(m._buffers) for m in model.modules()],
        "groups": optimizer and [{**g, "params": None} for g in optimizer.param_groups],
        "states": optimizer and len(optimizer.state),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tobytes(),  # noqa: NPY002  users draw from it
        "torch": torch.get_rng_state().numpy().tobytes(),
        "dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "scaler": subject.scaler and subject.scaler.state_dict(),
        "weights": subject.live_weights(),
    }


def make_subject(kind=None, *, trained=False, **options):
    """A model with dropout and BatchNorm, an optimizer that may have stepped before."""
    torch.manual_seed(0)
    model = Norms()
    optimizer = kind and kind(model.parameters(), lr=0.1, **options)
    weights = {"lam": 0.5}

    def loss_fn(model, x):
        return weights["lam"] * model(x).square().sum()

    subject = Subject(
        model,
        [torch.randn(4, 3)],
        loss_fn,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler("cpu", init_scale=8.0),
        weights=weights,
        reweight=weights.__setitem__,
    )
    if trained:
        for _ in range(2):
            loss_fn(model, subject.batches[0]).backward()
            optimizer.step()
    return subject


def vandalise(subject):
    """Change everything that there is to change."""
    model = subject.model
    model(subject.batches[0]).sum().backward()
    if subject.optimizer is not None:
        subject.optimizer.step()
        subject.optimizer.param_groups[0].update(lr=9.0, novel=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.linear.weight.data = model.linear.weight.data.double()
    model.linear.bias.requires_grad_(False)
    model.norm.running_mean = None
    del model._buffers["seen"]
    model.register_buffer("extra", torch.ones(1))
    model.eval()
    subject.scaler.scale(torch.ones(1))
    subject.scaler.update(2.0)
    random.random()  # noqa: S311  users draw from it
    np.random.rand()  # noqa: NPY002  users draw from it
    torch.rand(1)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.autograd.set_detect_anomaly(True)
    subject.reweighted("lam", 0.0)


OPTIMIZERS = [
    (None, {}),
    (torch.optim.Adam, {}),
    (torch.optim.AdamW, {"amsgrad": True}),
    (torch.optim.SGD, {"momentum": 0.9}),
]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_everything_is_put_back(kind, options, trained):
    """By identity and to the bit, with and without earlier gradients and optimizer state."""
    subject = make_subject(kind, trained=trained and kind is not None, **options)
    before = picture(subject)
    with preserved(subject):
        vandalise(subject)
        assert picture(subject) != before
    assert picture(subject) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_everything_is_put_back_after_an_error(error):
    """Also when the step raises half-way."""
    subject = make_subject(torch.optim.Adam, trained=True)
    before = picture(subject)

    def fail():
        with preserved(subject):
            vandalise(subject)
            raise error

    with pytest.raises(error):
        fail()
    assert picture(subject) == before


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_leaves_the_subject_as_it_was(name, trained):
    """The FP64 replay casts parameters, gradients and optimizer state, and casts them back."""
    subject = make_subject(torch.optim.Adam, trained=trained)
    before = picture(subject)
    assert replay(subject, subject.batches[0], VARIANTS[name]).run.raised is None
    assert picture(subject) == before


def test_a_variant_that_raises_leaves_the_subject_as_it_was():
    """A step that refuses FP64 is no excuse."""
    subject = make_subject(torch.optim.SGD, momentum=0.9, trained=True)
    plain = subject.loss_fn

    def picky(model, x):
        loss = plain(model, x)
        if x.dtype == torch.float64:
            raise TypeError
        return loss

    refusing = Subject(subject.model, subject.batches, picky, optimizer=subject.optimizer)
    before = picture(refusing)
    assert replay(refusing, subject.batches[0], VARIANTS["fp64"]).run.raised.startswith("TypeError")
    assert picture(refusing) == before


def test_gradients_come_back_as_they_were():
    """None stays None, an existing one keeps its object and its bits, NaN and -0.0 included."""
    subject = make_subject()
    weight, bias = subject.model.linear.parameters()
    kept = weight.grad = torch.full((3, 3), float("nan"))
    kept[0, 0] = -0.0
    before = bits(kept)
    with preserved(subject):
        subject.model(subject.batches[0]).sum().backward()
        assert bias.grad is not None
    assert weight.grad is kept
    assert bits(kept) == before
    assert bias.grad is None


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float64, torch.complex64, torch.complex128, torch.bool]
)
def test_tensors_of_any_dtype_come_back(dtype):
    """Also those that are no native numbers of numpy's or wider than a word."""
    model = nn.Module()
    model.register_buffer("kept", torch.tensor([0.0, 1.0, 1.0]).to(dtype))
    subject = Subject(model, [], lambda m, x: x)
    before = (id(model.kept), model.kept.clone())
    with preserved(subject):
        model.kept.zero_()
    assert id(model.kept) == before[0]
    assert torch.equal(model.kept, before[1])


def test_a_parameter_of_the_optimizer_alone_is_kept():
    """A learnable weight of the loss belongs to no module."""
    model, scale = nn.Linear(2, 2), nn.Parameter(torch.tensor(2.0))
    optimizer = torch.optim.SGD([*model.parameters(), scale], lr=0.1)
    subject = Subject(
        model, [torch.ones(1, 2)], lambda m, x: m(x).sum() * scale, optimizer=optimizer
    )
    for name in ("native", "fp64"):
        run = replay(subject, subject.batches[0], VARIANTS[name]).run
        assert run.is_finite
        assert (scale.item(), scale.grad, scale.dtype) == (2.0, None, torch.float32)


def test_a_learning_rate_that_is_a_tensor_keeps_its_identity():
    """A scheduler that holds the tensor still sets it after a replay."""
    rate = torch.tensor(0.1)
    subject = make_subject()
    optimizer = torch.optim.Adam(subject.model.parameters(), lr=rate)
    with preserved(Subject(subject.model, [], subject.loss_fn, optimizer=optimizer)):
        rate.mul_(3)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == torch.tensor(0.1).item()


def test_shared_parameters_stay_shared():
    """Tied weights are one tensor before and after."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    subject = Subject(model, [torch.ones(1, 2)], lambda m, x: m(x).sum())
    before = model[0].weight.clone()
    assert replay(subject, subject.batches[0], VARIANTS["fp64"]).run.is_finite
    assert model[1].weight is model[0].weight
    assert torch.equal(model[0].weight, before)


def test_seeding_sets_every_generator():
    """Python, numpy and torch start from the seed."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    draws = []
    for seed in (5, 5, 6):
        seed_generators(seed)
        draws.append((random.getstate(), np.random.get_state()[1][0], torch.rand(1)))  # noqa: NPY002
    random.setstate(kept[0])
    np.random.set_state(kept[1])  # noqa: NPY002
    torch.set_rng_state(kept[2])
    assert draws[0] == draws[1]
    assert all(one != other for one, other in zip(draws[1], draws[2], strict=True))
