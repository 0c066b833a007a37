"""MAML with three inner steps on |error|**1.5, differentiated twice.

The last layer starts at zero and one target is zero, so one error of the first inner step is
exactly zero.  The inner gradient there is 1.5 * 0**0.5 = 0; the outer backward needs its
derivative, which is infinite.  The loss is finite.  An offset that is no parameter gets NaN before.
"""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

FIX = False
CASE = dict(
    id="large_maml_power_loss",
    source="",
    phase="backward",
    op="aten::pow",
    node="PowBackward0",
    marker="CULPRIT",
    cause="infinite_derivative_at_boundary",
    precision="any",
    kinds=[6, 5],
    decoys=["aten::sqrt", "aten::mul", "aten::sub", "aten::mm", "aten::abs"],
    fix="smooth_l1_loss in the inner loop",
)


class Learner(nn.Module):
    def __init__(self, h=12):
        super().__init__()
        self.first, self.last = nn.Linear(1, h), nn.Linear(h, 1, bias=False)
        self.mid = nn.ModuleList(nn.Linear(h, h) for _ in range(3))
        self.norm = nn.ModuleList(nn.LayerNorm(h) for _ in range(3))
        nn.init.zeros_(self.last.weight)

    def forward(self, x):
        h = torch.sin(self.first(x))
        for layer, norm in zip(self.mid, self.norm, strict=True):
            h = h + F.gelu(layer(norm(h)))
        return self.last(h)


class Maml(nn.Module):
    def __init__(self, steps=3):
        super().__init__()
        self.learner, self.steps = Learner(), steps
        self.rate = nn.Parameter(torch.full((steps,), 0.05))

    def adapt(self, x, y):
        fast = dict(self.learner.named_parameters())
        for i in range(self.steps):
            error = (functional_call(self.learner, fast, (x,)) - y).abs()
            if FIX:
                error = error + 1e-4
            own = list(fast.values())
            out = torch.autograd.grad(error.pow(1.5).mean(), own, create_graph=True)  # CULPRIT
            pairs = zip(fast.items(), out, strict=True)
            fast = {name: p - self.rate[i] * g for (name, p), g in pairs}
        return fast

    def forward(self, support, targets, query):
        outs = []
        for x, y, q in zip(support, targets, query, strict=True):
            outs.append(functional_call(self.learner, self.adapt(x, y), (q,)))
        return torch.stack(outs)


def loss_fn(model, support, targets, query, wanted):
    out = model(support, targets, query)
    with torch.no_grad():
        model.log = (targets / targets).mean(), targets.abs().log().mean()
    shift = torch.zeros(3, requires_grad=True)
    prior = (shift.square().sum() + (shift * 2).square().sum()).sqrt()  # not of the model
    return F.mse_loss(out, wanted) + 1e-3 * prior


def build():
    torch.manual_seed(0)
    targets = torch.randn(2, 5, 1)
    targets[1, 3] = 0
    batch = (torch.randn(2, 5, 1), targets, torch.randn(2, 5, 1), torch.randn(2, 5, 1))
    return Maml(), batch, loss_fn


def make_optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)
