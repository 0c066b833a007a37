"""Small models really trained: healthy runs have no symptom, and planted faults have theirs."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from nanhunt.health import check, examine
from nanhunt.records import Figures


class Log:
    """The figures of a loop, taken as a careful loop takes them."""

    def __init__(self, model, optimizer, *, scheduler=None, clip=None):
        self.model, self.optimizer = model, optimizer
        self.scheduler, self.clip = scheduler, clip
        self.figures = []

    def groups(self):
        """The trainable parameters of each top-level child."""
        for name, child in self.model.named_children():
            if found := [p for p in child.parameters() if p.grad is not None]:
                yield name, found

    def step(self, loss, *, validation=None):
        """Backward, clip, step, schedule; the figures of it."""
        self.optimizer.zero_grad()
        loss.backward()
        norms = tuple(
            (name, math.hypot(*(p.grad.norm().item() for p in found)))
            for name, found in self.groups()
        )
        clipped = None
        if self.clip is not None:
            total = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip).item()
            clipped = self.clip / total if total > self.clip else None
        rates = tuple(group["lr"] for group in self.optimizer.param_groups)
        before = [p.detach().clone() for p in self.model.parameters()]
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        step = len(self.figures)
        updates = tuple(self.updates(before)) if step % 10 == 0 else ()
        self.figures.append(
            Figures(
                step, loss.item(), stepped=True, why="", norms=norms, nonfinite=0, rates=rates,
                clipped=clipped, updates=updates,
                scheduled=None if self.scheduler is None else True,
                validated=validation is not None, validation=validation,
            )
        )  # fmt: skip

    def updates(self, before):
        """How far each group moved, beside its size."""
        old = dict(zip(map(id, self.model.parameters()), before, strict=True))
        for name, found in self.groups():
            moved = math.hypot(*((p - old[id(p)]).norm().item() for p in found))
            size = math.hypot(*(old[id(p)].norm().item() for p in found))
            yield name, moved / size if size else math.inf


def mlp(*widths, act=nn.ReLU):
    """A net of dense layers."""
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), act())]
    return nn.Sequential(*layers[:-1])


def warm_cosine(optimizer, steps, warm):
    """A linear warm-up from 0, then half a cosine down to 0."""

    def factor(k):
        if k < warm:
            return k / warm
        return 0.5 * (1 + math.cos(math.pi * (k - warm) / (steps - warm)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def classify(seed, steps=400):
    """Adam with warm-up, cosine and clipping on noisy labels, in small batches."""
    torch.manual_seed(seed)
    net = mlp(16, 64, 64, 5)
    teacher = torch.randn(16, 5)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    log = Log(net, optimizer, scheduler=warm_cosine(optimizer, steps, 60), clip=1.0)
    for k in range(steps):
        x = torch.randn(32, 16)
        y = (x @ teacher + torch.randn(32, 5)).argmax(-1)
        told = 1.0 if k % 100 == 99 else None
        log.step(nn.functional.cross_entropy(net(x), y), validation=told)
    return [log.figures]


def plateau(seed, steps=1500):
    """SGD on a problem that is solved early: the rest of the run is a plateau."""
    torch.manual_seed(seed)
    net = mlp(4, 16, 1, act=nn.Tanh)
    x = torch.randn(64, 4)
    y = x[:, :1] * x[:, 1:2] + 0.3 * torch.randn(64, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    log = Log(net, optimizer)
    for _ in range(steps):
        pick = torch.randint(0, 64, (8,))
        log.step((net(x[pick]) - y[pick]).square().mean())
    return [log.figures]


def interpolate(seed, steps=2000):
    """Adam down to a loss of 0, where gradients vanish because there is nothing left."""
    torch.manual_seed(seed)
    net = mlp(4, 32, 1, act=nn.Tanh)
    x = torch.randn(16, 4)
    y = torch.sin(x.sum(-1, keepdim=True))
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.998)
    log = Log(net, optimizer, scheduler=scheduler)
    for _ in range(steps):
        log.step((net(x) - y).square().mean())
    return [log.figures]


def separate(seed, steps=800):
    """A hinge loss that is satisfied: loss and gradients are exactly 0 at the end."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, 1))
    w = torch.randn(8, 1)
    x = torch.randn(40, 8)
    y = (x @ w).sign()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    log = Log(net, optimizer)
    for _ in range(steps):
        log.step((1 - y * net(x)).relu().mean())
    return [log.figures]


def adversaries(seed, steps=700):
    """A small GAN: two losses that swing against each other, neither of which must fall."""
    torch.manual_seed(seed)
    maker, critic = mlp(4, 32, 32, 2), mlp(2, 32, 32, 1)
    makes = torch.optim.Adam(maker.parameters(), lr=1e-3, betas=(0.5, 0.999))
    judges = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.999))
    first, second = Log(critic, judges), Log(maker, makes)
    for _ in range(steps):
        angle = 2 * math.pi * torch.rand(64, 1)
        real = torch.cat([angle.cos(), angle.sin()], -1) + 0.05 * torch.randn(64, 2)
        fake = maker(torch.randn(64, 4))
        soft = nn.functional.softplus
        first.step(soft(-critic(real)).mean() + soft(critic(fake.detach())).mean())
        second.step(soft(-critic(fake)).mean())
    return [first.figures, second.figures]


def tokens(seed, steps=200):
    """A transformer of one layer on sequences, with Adam and a constant rate."""
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
    net = nn.ModuleDict({"embed": nn.Embedding(12, 32), "layer": layer, "head": nn.Linear(32, 12)})
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    log = Log(net, optimizer)
    for _ in range(steps):
        start, stride = torch.randint(0, 12, (16, 1)), torch.randint(1, 3, (16, 1))
        text = (start + stride * torch.arange(9)) % 12
        out = net["head"](net["layer"](net["embed"](text[:, :-1])))
        log.step(nn.functional.cross_entropy(out.flatten(0, 1), text[:, 1:].flatten()))
    return [log.figures]


def restarts(seed, steps=1200):
    """Warm restarts of a cosine (SGDR): the loss rises with the rate, and may."""
    torch.manual_seed(seed)
    net = mlp(16, 32, 3)
    teacher = torch.randn(16, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 200)
    log = Log(net, optimizer, scheduler=scheduler)
    for _ in range(steps):
        x = torch.randn(64, 16)
        log.step(nn.functional.cross_entropy(net(x), (x @ teacher).argmax(-1)))
    return [log.figures]


def deep_linear(seed, steps=1500):
    """A deep linear net from a small start: a long saddle, then gradients grow a hundredfold."""
    torch.manual_seed(seed)
    net = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(3)))
    for p in net.parameters():
        nn.init.normal_(p, std=0.08)
    x = torch.randn(256, 6)
    y = x @ torch.randn(6, 6)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    log = Log(net, optimizer)
    for _ in range(steps):
        log.step((net(x) - y).square().mean())
    return [log.figures]


RUNS = (classify, plateau, interpolate, separate, adversaries, tokens, restarts, deep_linear)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_healthy_runs_have_no_symptom(run):
    """Whatever the rules look at, they leave a healthy run alone."""
    for figures in run(0):
        assert examine(figures) == ()
        assert len(check(figures).absent) >= 10  # and it is not that nothing could be told


def sick(net, optimizer, *, seed=0, steps=300, random_labels=False):
    """A classifier trained as it should not be."""
    torch.manual_seed(seed + 100)
    teacher = torch.randn(16, 5)
    log = Log(net, optimizer)
    for _ in range(steps):
        x = torch.randn(32, 16)
        y = torch.randint(0, 5, (32,)) if random_labels else (x @ teacher).argmax(-1)
        log.step(nn.functional.cross_entropy(net(x), y))
    return [symptom.slug for symptom in examine(log.figures)]


def net_of(*hidden, act=nn.ReLU):
    """A fresh classifier, the same in each test."""
    torch.manual_seed(0)
    return mlp(16, *(hidden or (64, 64)), 5, act=act)


def test_deep_sigmoids_vanish():
    """Twelve of them: the first layers get nothing, and do not move."""
    net = net_of(*[32] * 12, act=nn.Sigmoid)
    found = sick(net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert {"vanishing_gradients", "parameters_do_not_move"} <= set(found)


def test_units_that_are_never_on_are_dead():
    """A bias of -100 below a ReLU."""
    net = net_of()
    with torch.no_grad():
        net[0].bias.fill_(-100)
    found = sick(net, torch.optim.Adam(net.parameters(), lr=1e-3))
    assert found == ["dead_parameters", "parameters_do_not_move"]


def test_an_optimizer_of_another_model_moves_nothing():
    """The parameters were copied after the optimizer was made."""
    net, other = net_of(), net_of()
    found = sick(net, torch.optim.Adam(other.parameters(), lr=1e-3))
    assert found == ["parameters_do_not_move", "loss_not_decreasing"]


def test_random_labels_teach_nothing():
    """The loss stays at the entropy of the labels."""
    net = net_of()
    found = sick(net, torch.optim.Adam(net.parameters(), lr=1e-3), random_labels=True)
    assert found == ["loss_not_decreasing"]


def test_gradient_ascent_explodes():
    """The sign of the loss is wrong."""
    net = net_of()
    found = sick(net, torch.optim.SGD(net.parameters(), lr=0.05, maximize=True), steps=150)
    assert "exploding_gradients" in found
