"""watch: a training under it ends in the same bits as the plain loop that it replaces."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

import nanhunt

STEPS = 200


class Net(nn.Module):
    """Dropout and batch norm between two layers, a frozen layer and one without gradient."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(6, 6).requires_grad_(requires_grad=False)
        self.body, self.norm, self.drop = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2)
        self.head, self.unused = nn.Linear(16, 3), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.body(self.frozen(x))).relu()))


def batches(count=STEPS, seed=7):
    """Batches that do not draw from the global generator."""
    drawn = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randn(12, 6, generator=drawn), torch.randn(12, 3, generator=drawn)


def started(make=Net):
    """A model, and every generator where it always starts."""
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002 - what users draw from
    torch.manual_seed(3)
    return make()


def loss_of(model, x, y):
    """Draws from all three generators, as augmentations do."""
    noise = random.random() + np.random.random()  # noqa: NPY002, S311 - as above
    return (model(x + 0.01 * noise) - y).square().mean()


def half_loss(model, x, y, dtype):
    with torch.autocast("cpu", dtype=dtype):
        return loss_of(model, x, y)


def state(model, *others):
    """All that a training leaves."""
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002 - as above
    named = [dict(model.named_parameters()), dict(model.named_buffers())]
    return [*named, *drawn, *(other.state_dict() for other in others)]


def assert_same(one, other, path="state"):
    """Equal to the bit, and of one shape."""
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, path
        assert one.shape == other.shape, path
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        kind = width[one.element_size()]
        assert torch.equal(one.detach().contiguous().view(kind),
                           other.detach().contiguous().view(kind)), path  # fmt: skip
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other), path
    elif isinstance(one, dict):
        assert list(one) == list(other), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{path}[{i}]")
    elif not callable(one):
        assert one == other, path


def schedule(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "foreach": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "capturable": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2)),
    "groups": lambda p: torch.optim.AdamW([{"params": p[-2:], "lr": 1e-3}, {"params": p[:-2]}]),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_plain_training(kind):
    """Optimizers of every kind, a schedule and clipping that bites."""
    model = started()
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    scheduler = schedule(optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        scheduler.step()
    plain = state(model, optimizer, scheduler)

    model = started()
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    scheduler = schedule(optimizer)
    watch = nanhunt.watch(model, optimizer, scheduler=scheduler, clip=0.3, keep_previous=True)
    outcomes = [watch.step(lambda: loss_of(model, x, y)) for x, y in batches()]
    assert_same(plain, state(model, optimizer, scheduler))
    assert all(outcome.stepped and outcome.scheduled for outcome in outcomes)
    assert sum(outcome.clipped is not None for outcome in outcomes) > STEPS // 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["adamw", "fused", "sgd"])
def test_autocast_and_scaler(dtype, kind):
    """Autocast with a scaler that overflows at first, skips and grows again."""

    def make():
        model = started()
        optimizer = OPTIMIZERS[kind](list(model.parameters()))
        scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0**40, growth_interval=25, enabled=dtype is torch.float16
        )
        return model, optimizer, scaler, schedule(optimizer)

    model, optimizer, scaler, scheduler = make()
    skipped = 0
    for x, y in batches():
        optimizer.zero_grad()
        scaler.scale(half_loss(model, x, y, dtype)).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 0.5)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= before:
            scheduler.step()
        else:
            skipped += 1
    plain = state(model, optimizer, scheduler, scaler)

    model, optimizer, scaler, scheduler = make()
    watch = nanhunt.watch(model, optimizer, scaler=scaler, scheduler=scheduler, clip=0.5)
    outcomes = [watch.step(lambda: half_loss(model, x, y, dtype)) for x, y in batches()]
    assert_same(plain, state(model, optimizer, scheduler, scaler))
    assert [o.why for o in outcomes].count("scaler") == skipped
    assert (skipped > 1) == (dtype is torch.float16)
    assert all(outcome.report is None for outcome in outcomes)


def test_accumulation():
    """Micro-batches whose losses are divided by their number."""
    model = started()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = schedule(optimizer)
    for index, (x, y) in enumerate(batches(4 * STEPS), 1):
        (loss_of(model, x, y) / 4).backward()
        if index % 4 == 0:
            clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    plain = state(model, optimizer, scheduler)

    model = started()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = schedule(optimizer)
    watch = nanhunt.watch(model, optimizer, scheduler=scheduler, clip=0.3, accumulate=4)
    outcomes = [watch.step(lambda: loss_of(model, x, y)) for x, y in batches(4 * STEPS)]
    assert_same(plain, state(model, optimizer, scheduler))
    assert [o.why for o in outcomes[:4]] == ["accumulating"] * 3 + [""]
    assert outcomes[0].loss is None
    assert len(watch.figures) == STEPS


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs(search):
    """An optimizer that evaluates the loss itself, several times per step."""

    def make():
        model = started(lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)))
        settings = {"lr": 0.1, "max_iter": 4, "line_search_fn": search}
        return model, torch.optim.LBFGS(model.parameters(), **settings)

    model, optimizer = make()
    for x, y in batches():

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            return loss

        optimizer.step(closure)
    plain = state(model, optimizer)

    model, optimizer = make()
    watch = nanhunt.watch(model, optimizer, clip=1.0)
    for x, y in batches():
        assert watch.step(lambda: loss_of(model, x, y)).stepped
    assert_same(plain, state(model, optimizer))


@pytest.mark.parametrize("scaled", [False, True])
def test_two_optimizers(scaled):
    """They step together; the scaler judges each by itself, as in a plain loop."""

    def make():
        model = started()
        pair = (
            torch.optim.SGD([*model.body.parameters(), *model.norm.parameters()], lr=0.01),
            torch.optim.AdamW(model.head.parameters(), lr=1e-2),
        )
        return model, pair, torch.amp.GradScaler("cpu", init_scale=2.0**40, enabled=scaled)

    dtype = torch.float16 if scaled else torch.bfloat16
    model, pair, scaler = make()
    for x, y in batches():
        for optimizer in pair:
            optimizer.zero_grad()
        scaler.scale(half_loss(model, x, y, dtype)).backward()
        for optimizer in pair:
            scaler.step(optimizer)
        scaler.update()
    plain = state(model, *pair, scaler)

    model, pair, scaler = make()
    watch = nanhunt.watch(model, pair, scaler=scaler)
    for x, y in batches():
        watch.step(lambda: half_loss(model, x, y, dtype))
    assert_same(plain, state(model, *pair, scaler))


def test_adversaries():
    """Two watches in one process, each with its own model, whose losses go through the other."""

    def make():
        models = started(lambda: nn.ModuleList([nn.Linear(6, 6), Net()]))
        pair = [torch.optim.Adam(m.parameters(), lr=1e-3) for m in models]
        return models, pair

    def judging(models, x):
        return (models[1](x) - 1).square().mean() + models[1](models[0](x).detach()).square().mean()

    def making(models, x):
        return (models[1](models[0](x)) - 1).square().mean()

    models, (making_one, judging_one) = make()
    for x, _ in batches():
        judging_one.zero_grad()
        judging(models, x).backward()
        judging_one.step()
        making_one.zero_grad()
        making(models, x).backward()
        making_one.step()
    plain = state(models, making_one, judging_one)

    models, (making_one, judging_one) = make()
    judge = nanhunt.watch(models[1], judging_one)
    maker = nanhunt.watch(models[0], making_one)
    for x, _ in batches():
        assert judge.step(lambda: judging(models, x)).stepped
        assert maker.step(lambda: making(models, x)).stepped
    assert_same(plain, state(models, making_one, judging_one))


def test_compiled_model():
    """A compiled model stays compiled, and its training stays as it is."""

    def make():
        torch._dynamo.reset()
        model = started()
        return model, torch.compile(model, backend="aot_eager"), torch.optim.AdamW(
            model.parameters(), lr=1e-2
        )  # fmt: skip

    model, compiled, optimizer = make()
    for x, y in batches():
        optimizer.zero_grad()
        (compiled(x) - y).square().mean().backward()
        clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
    plain = state(model, optimizer)

    model, compiled, optimizer = make()
    watch = nanhunt.watch(compiled, optimizer, clip=0.3)
    for x, y in batches():
        watch.step(lambda: (compiled(x) - y).square().mean())
    assert_same(plain, state(model, optimizer))
    torch._dynamo.reset()


def test_complex_and_mixed_precision():
    """Gradients of several dtypes are clipped by one norm, summed in torch's own order."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.randn(5))
            self.b = nn.Parameter(torch.randn(5, dtype=torch.float64))
            self.c = nn.Parameter(torch.randn(5, dtype=torch.complex64))
            self.d = nn.Parameter(torch.randn(4))

        def forward(self):
            return (self.a * self.b).square().sum() + self.c.abs().sum() + self.d.exp().sum()

    def make():
        model = started(Mixed)
        return model, torch.optim.SGD(model.parameters(), lr=0.01)

    model, optimizer = make()
    for _ in range(STEPS):
        optimizer.zero_grad()
        model().backward()
        clip_grad_norm_(model.parameters(), 0.7)
        optimizer.step()
    plain = state(model, optimizer)

    model, optimizer = make()
    watch = nanhunt.watch(model, optimizer, clip=0.7)
    for _ in range(STEPS):
        assert watch.step(model).stepped
    assert_same(plain, state(model, optimizer))


def test_sparse_gradients():
    """An embedding with sparse gradients trains as ever; its norm is that of the values."""

    def make():
        model = started(lambda: nn.Embedding(20, 4, sparse=True))
        return model, torch.optim.SparseAdam(list(model.parameters()), lr=0.01)

    def words():
        drawn = torch.Generator().manual_seed(5)
        for _ in range(STEPS):
            yield torch.randint(0, 20, (8,), generator=drawn)

    model, optimizer = make()
    for word in words():
        optimizer.zero_grad()
        model(word).square().sum().backward()
        optimizer.step()
    plain = state(model, optimizer)

    model, optimizer = make()
    watch = nanhunt.watch(model, optimizer)
    for word in words():
        outcome = watch.step(lambda: model(word).square().sum())
        assert outcome.norm == pytest.approx(float(model.weight.grad.coalesce().values().norm()))
    assert_same(plain, state(model, optimizer))


def test_a_model_that_is_its_own_closure_and_named_terms():
    """The sum of named terms trains as the sum that a loop writes out."""

    def terms(model, x, y):
        out = model(x)
        return {"square": (out - y).square().mean(), "size": 0.01 * out.abs().mean()}

    model = started()
    optimizer = torch.optim.AdamW(model.parameters())
    for x, y in batches():
        optimizer.zero_grad()
        torch.stack(list(terms(model, x, y).values())).sum().backward()
        optimizer.step()
    plain = state(model, optimizer)

    model = started()
    optimizer = torch.optim.AdamW(model.parameters())
    watch = nanhunt.watch(model, optimizer)
    for batch in batches():
        watch.step(lambda pair: terms(model, *pair), batch=batch)
    assert_same(plain, state(model, optimizer))
