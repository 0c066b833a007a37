"""Ensemble of point networks whose stacked weights run under torch.func.vmap.

Every member softens its pairwise distances; the diagonal is the root of zero, so the backward is
inf * 0 in every block.  The query points are a leaf without a parameter behind it: their own roots
of zero come earlier in the backward and reach no parameter.
"""

import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

FIX = False
CASE = dict(
    id="large_vmap_ensemble_distance",
    source="",
    phase="backward",
    op="aten::sqrt",
    node="SqrtBackward0",
    marker="CULPRIT",
    cause="infinite_derivative_at_boundary",
    precision="any",
    kinds=[5, 1],
    decoys=["aten::pow", "aten::sub", "aten::bmm", "aten::exp"],
    fix="eps inside the root",
)


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.value, self.gate, self.norm = nn.Linear(d, d), nn.Linear(d, d), nn.LayerNorm(d)
        self.place = nn.Linear(d, 2)

    def forward(self, x):
        h = self.norm(x)
        p = self.place(h)
        d2 = (p.unsqueeze(-2) - p.unsqueeze(-3)).square().sum(-1)
        if FIX:
            d2 = d2 + 1e-8
        near = (-d2.sqrt()).softmax(-1)  # CULPRIT
        return x + torch.sigmoid(self.gate(h)) * (near @ self.value(h))


class Member(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.stem, self.out = nn.Linear(3, d), nn.Linear(d, 2)
        self.blocks = nn.ModuleList(Block(d) for _ in range(4))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        mean, rough = self.out(x).unbind(-1)
        return mean, nn.functional.softplus(rough) + 1e-3


class Ensemble(nn.Module):
    def __init__(self, members=3):
        super().__init__()
        params, _ = stack_module_state([Member() for _ in range(members)])
        self.names = list(params)
        self.stacked = nn.ParameterList(nn.Parameter(p.detach()) for p in params.values())
        object.__setattr__(self, "template", Member().requires_grad_(False))

    def forward(self, x):
        def single(params, points):
            return functional_call(self.template, params, (points,))

        params = dict(zip(self.names, self.stacked, strict=True))
        return vmap(single, in_dims=(0, None))(params, x)


def loss_fn(model, x, y):
    mean, var = model(x)
    nll = 0.5 * ((mean - y).square() / var + var.log()).mean()
    spread = mean.std(0).mean()
    with torch.no_grad():
        gap = vmap(lambda a: a / a.sum())(x - x)  # NaN, logged
        model.log = gap.mean()
    query = x[:, :2].clone().requires_grad_()
    radius = vmap(lambda a: (a - a.detach()).square().sum(-1).sqrt())(query)
    return nll + 1e-2 * spread + 1e-3 * radius.mean()


def build():
    torch.manual_seed(0)
    return Ensemble(), (torch.randn(2, 6, 3), torch.randn(2, 6)), loss_fn


def make_optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)
