"""WGAN-GP critic step with a generator, two optimizers and a frozen feature network.

One interpolate is all zeros and every ReLU of the critic is dead there, so the critic's gradient
with respect to it is exactly zero; the penalty takes the root of its squared norm.  The loss is
finite, and the double backward is inf * 0.  The path-length term of the frozen network makes NaN
earlier in the backward, for the interpolates only.
"""

import torch
from torch import nn
from torch.nn import functional as F

FIX = False
CASE = dict(
    id="large_wgan_dead_critic",
    source="",
    phase="backward",
    op="aten::sqrt",
    node="SqrtBackward0",
    marker="CULPRIT",
    cause="infinite_derivative_at_boundary",
    precision="any",
    kinds=[6, 1, 10],
    decoys=["aten::pow", "aten::mm", "aten::threshold_backward"],
    fix="eps inside the root",
)


class Critic(nn.Module):
    def __init__(self, d=6, h=12):
        super().__init__()
        sizes = [d, h, h, h]
        pairs = zip(sizes, sizes[1:], strict=False)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairs)
        self.last = nn.Linear(h, 1)
        for layer in self.layers:
            nn.init.constant_(layer.bias, -0.01)

    def forward(self, x):
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.last(x).squeeze(-1)


class Generator(nn.Module):
    def __init__(self, d=6, h=12):
        super().__init__()
        self.first, self.last = nn.Linear(4, h), nn.Linear(h, d)
        self.mid = nn.ModuleList(nn.Linear(h, h) for _ in range(4))
        self.norm = nn.ModuleList(nn.LayerNorm(h) for _ in range(4))

    def forward(self, z):
        h = self.first(z)
        for layer, norm in zip(self.mid, self.norm, strict=True):
            h = h + F.silu(layer(norm(h)))
        return self.last(h)


class Gan(nn.Module):
    def __init__(self):
        super().__init__()
        self.critic, self.generator = Critic(), Generator()
        self.features = Critic().requires_grad_(False)


def penalty(model, real, fake, alive):
    mix = (0.5 * (real + fake.detach()) * alive).requires_grad_()
    score = model.critic(mix).sum()
    slope = torch.autograd.grad(score, mix, create_graph=True)[0]
    square = slope.square().sum(1)
    if FIX:
        square = square + 1e-12
    norm = square.sqrt()  # CULPRIT
    twin = (model.features(mix) - model.features(mix).detach()).square().sqrt()  # last: runs first
    return (norm - 1).square().mean() + 1e-3 * twin.mean()


def loss_fn(model, real, z, alive):
    fake = model.generator(z)
    with torch.no_grad():
        share = model.critic(real * 0).relu()
        model.log = share / share.sum(), fake.var(0) / (alive - alive).sum()
    distance = model.critic(fake).mean() - model.critic(real).mean()
    drift = F.mse_loss(model.features(fake), model.features(real))
    return distance + 10 * penalty(model, real, fake, alive) + 0.1 * drift


def build():
    torch.manual_seed(0)
    alive = torch.ones(5, 1)
    alive[3] = 0  # an augmentation that erases the sample
    return Gan(), (torch.randn(5, 6), torch.randn(5, 4), alive), loss_fn


def train_step(model, batch, loss_fn, opt, scaler, step):
    both = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (model.critic, model.generator)]
    for one in both:
        one.zero_grad()
    loss = loss_fn(model, *batch)
    yield "loss", loss
    loss.backward()
    yield "grads", loss
    for one in both:
        one.step()
    yield "step", loss
