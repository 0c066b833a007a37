"""Healthy: a physics-informed network with vmap, grad of grad and hooks that repair gradients.

The exact solution has a pole outside of the domain and is selected away; the singular collocation
points are weighted out as data, by indexing; the boundary distance has a gradient that is not
finite and that a hook on it replaces; a leaf that is no parameter keeps its NaN.
"""

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

CASE = dict(
    id="large_control_physics_vmap",
    source="",
    phase="none",
    op=None,
    node=None,
    marker="CULPRIT",
    cause="healthy",
    precision="any",
    kinds=[5, 6, 7, 1],
    decoys=["aten::sqrt", "SqrtBackward0", "aten::div", "aten::log", "aten::reciprocal"],
    fix="",
)


def repair(g):
    return torch.nan_to_num(g, 0.0, 0.0, 0.0)


class Field(nn.Module):
    def __init__(self, h=12):
        super().__init__()
        self.first, self.last = nn.Linear(2, h), nn.Linear(h, 1)
        self.mid = nn.ModuleList(nn.Linear(h, h) for _ in range(3))

    def forward(self, x):
        h = torch.tanh(self.first(x))
        for layer in self.mid:
            h = h + torch.tanh(layer(h))
        return self.last(h).squeeze(-1)


class Physics(nn.Module):
    def __init__(self):
        super().__init__()
        self.field, self.shift = Field(), nn.Parameter(torch.zeros(4, 2))

    def laplace(self, x):
        params = dict(self.field.named_parameters())

        def u(z):
            return functional_call(self.field, params, (z,))

        def second(z, i):
            return grad(lambda a: grad(u)(a)[i])(z)[i]

        return vmap(lambda z: second(z, 0) + second(z, 1))(x)

    def forward(self, x, edge):
        radius = x.square().sum(1)
        source = torch.where(radius > 0, radius.log(), torch.zeros(()))
        inner = radius > 0
        residual = (self.laplace(x) - source)[inner] * (1 / radius)[inner].clamp(max=10)
        moved = edge + self.shift
        gap = moved - moved.detach()  # zero by construction
        gap.register_hook(repair)
        distance = gap.square().sum(1).sqrt()
        return residual, self.field(moved), distance


def loss_fn(model, x, edge, value):
    x = x.clone().requires_grad_()
    residual, boundary, distance = model(x, edge)
    turn = (x - x.detach()).square().sum(1).sqrt()  # for the leaf alone
    with torch.no_grad():
        exact = torch.where(value > 0, value.rsqrt(), torch.zeros_like(value))
        slope = vmap(grad(lambda a: a.square().sum().sqrt()))(x)
        model.log = (residual / residual.mul(0)).mean(), slope.mean()
    loss = residual.square().mean() + F.mse_loss(boundary, exact)
    return loss + 1e-2 * distance.mean() + 1e-3 * turn.mean()


def build():
    torch.manual_seed(0)
    x = torch.rand(7, 2) - 0.5
    x[3] = 0
    return Physics(), (x, torch.rand(4, 2), torch.tensor([1.0, 0.0, 0.5, 2.0])), loss_fn


def make_optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)
