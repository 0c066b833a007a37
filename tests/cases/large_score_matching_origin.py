"""Sliced score matching of an energy network; the score is torch.func.grad under vmap.

The energy has a radial term, and one sample is the origin: the inner backward of the root divides
0 by 0 in the forward of the step, and the loss is NaN.  The line holds both, the root and the
gradient.  The noise levels and the buckets of the log are non-finite before, and selected away.
"""

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

FIX = False
CASE = dict(
    id="large_score_matching_origin",
    source="",
    phase="forward",
    op="aten::sqrt",
    node="SqrtBackward0",
    marker="CULPRIT",
    cause="infinite_derivative_at_boundary",
    precision="any",
    kinds=[5, 6, 1],
    also=["aten::div"],
    decoys=["aten::mul", "aten::add", "aten::pow", "aten::sum", "aten::reciprocal"],
    fix="eps inside the root",
)


class Energy(nn.Module):
    def __init__(self, d=4, h=16):
        super().__init__()
        self.first = nn.Linear(d + 1, h)
        self.rest = nn.ModuleList(nn.Linear(h, h) for _ in range(5))
        self.norms = nn.ModuleList(nn.LayerNorm(h) for _ in range(5))
        self.last = nn.Linear(h, 1)

    def forward(self, x, level):
        h = torch.tanh(self.first(torch.cat([x, level])))
        for layer, norm in zip(self.rest, self.norms, strict=True):
            h = h + torch.tanh(layer(norm(h)))
        return self.last(h).squeeze(-1)


class Score(nn.Module):
    def __init__(self):
        super().__init__()
        self.energy = Energy()
        self.pull = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, level):
        params = dict(self.energy.named_parameters())
        eps = 1e-8 if FIX else 0.0

        def net(z, t):
            return functional_call(self.energy, params, (z, t)) + 0.1 * z.square().sum()

        pull = self.pull
        away = vmap(grad(lambda z: pull * (z.square().sum() + eps).sqrt()))(x)  # CULPRIT
        return vmap(grad(net))(x, level) + away


def loss_fn(model, x, level, noise):
    with torch.no_grad():
        snr = (1 - level) / level  # inf at level 0
        weight = torch.where(level > 0, snr / (1 + snr), torch.ones_like(snr))
        model.log = vmap(grad(lambda v: (v - v).abs().sqrt().sum()))(x), snr.std()
    score = model(x + level * noise, level)
    target = -noise * torch.where(level > 0, torch.ones_like(level), torch.zeros_like(level))
    return (weight * (level * score - target).square()).mean() + 1e-2 * score.square().mean()


def build():
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    x[2] = 0
    level = torch.tensor([0.1, 0.4, 0.0, 0.7, 0.9, 0.2])[:, None]
    return Score(), (x, level, torch.randn(6, 4)), loss_fn


def make_optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)
