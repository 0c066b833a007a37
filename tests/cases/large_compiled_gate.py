"""Two-tower recommender whose fusion block is a compiled function.

The block takes a fractional power of a rectified similarity: its derivative at zero is infinite,
and the rectifier below multiplies it by zero.  The loss is finite.  Earlier in the backward a
dwell-time term, also compiled, makes NaN for a leaf that is no parameter.
"""

import torch
from torch import nn
from torch.nn import functional as F

FIX = False
CASE = dict(
    id="large_compiled_gate",
    source="",
    phase="backward",
    op="aten::pow",
    node="PowBackward0",
    marker="CULPRIT",
    cause="infinite_derivative_at_boundary",
    precision="any",
    kinds=[8, 1],
    also=["CompiledFunctionBackward"],
    module="fusion",
    decoys=["aten::sqrt", "SqrtBackward0", "aten::clamp", "aten::mul", "aten::mm"],
    fix="eps inside the power",
)


def dwell(seconds):
    return seconds.square().sum(-1).sqrt().mean()


class Tower(nn.Module):
    def __init__(self, i, d):
        super().__init__()
        self.embed = nn.EmbeddingBag(20, d, mode="mean")
        self.dense = nn.Linear(i, d)
        self.layers = nn.ModuleList(nn.Linear(2 * d, 2 * d) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(2 * d) for _ in range(4))

    def forward(self, ids, x):
        h = torch.cat([self.embed(ids), self.dense(x)], -1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            h = h + F.silu(layer(norm(h)))
        return h


class Fusion(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.left, self.right = nn.Linear(d, 6, bias=False), nn.Linear(d, 6, bias=False)
        self.out = nn.Linear(6, 1)

    def forward(self, a, b):
        score = self.left(a) * self.right(b)
        score = score * (score > 0)
        if FIX:
            score = score + 1e-6
        gate = score.pow(0.75)  # CULPRIT
        return self.out(gate).squeeze(-1)


class Recommender(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.user, self.item = Tower(3, d), Tower(2, d)
        self.fusion = Fusion(2 * d)
        # not through Module.compile, so that the compiled function is an ordinary attribute
        self.fast = torch.compile(self.fusion.forward, backend="eager")
        self.dwell = torch.compile(dwell, backend="eager")

    def forward(self, ids, x, items, y):
        return self.fast(self.user(ids, x), self.item(items, y))


def loss_fn(model, ids, x, items, y, click, seconds):
    out = model(ids, x, items, y)
    with torch.no_grad():
        share = click.sum() / (click - click).sum()  # inf, logged
        model.log = share, (1 - out.sigmoid().round()).log().mean()
    seconds = seconds.clone().requires_grad_()
    return F.binary_cross_entropy_with_logits(out, click) + 1e-3 * model.dwell(seconds)


def build():
    torch.manual_seed(0)
    seconds = torch.rand(4, 3)
    seconds[2] = 0  # left at once
    ids, items = torch.randint(0, 20, (4, 5)), torch.randint(0, 20, (4, 2))
    click = torch.tensor([1.0, 0.0, 1.0, 0.0])
    batch = (ids, torch.randn(4, 3), items, torch.randn(4, 2), click, seconds)
    return Recommender(), batch, loss_fn


def make_optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)
