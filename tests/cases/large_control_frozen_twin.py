"""Healthy: a checkpointed transformer next to a frozen twin full of NaN.

Fully masked softmax rows, empty means, a log of zero, an auxiliary head outside of the loss and
NaN gradients of a leaf that is no parameter: none of it reaches the loss or a parameter.  The
checkpointed blocks divide by zero again in their recomputation and select it away.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CASE = dict(
    id="large_control_frozen_twin",
    source="",
    phase="none",
    op=None,
    node=None,
    marker="CULPRIT",
    cause="healthy",
    precision="any",
    kinds=[1, 9, 12, 13],
    steps=2,
    decoys=["aten::_softmax", "aten::div", "aten::mean", "aten::log", "aten::sqrt"],
    fix="",
)


class Attention(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(d, d)

    def forward(self, x, pad, fill):
        k, v = self.kv(x).chunk(2, -1)
        scores = self.q(x) @ k.transpose(-1, -2) / k.shape[-1] ** 0.5
        scores = scores.masked_fill(pad.unsqueeze(1) | pad.unsqueeze(2), fill)
        return self.out(scores.softmax(-1) @ v)


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.attn, self.n1, self.n2 = Attention(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x, pad, fill=-1e9):
        free = torch.where(pad, torch.zeros(()), 1 / (~pad).float())
        x = x + free.unsqueeze(-1) * self.attn(self.n1(x), pad, fill)
        return x + self.mlp(self.n2(x))


class Student(nn.Module):
    def __init__(self, d=16):
        super().__init__()
        self.twin = nn.ModuleList(Block(d) for _ in range(2)).requires_grad_(False)
        self.stem, self.blocks = nn.Linear(4, d), nn.ModuleList(Block(d) for _ in range(4))
        self.head, self.aux = nn.Linear(d, 3), nn.Linear(d, 1)

    def forward(self, x, pad):
        x = self.stem(x)
        with torch.no_grad():
            t = x
            for block in self.twin:
                t = block(t, pad, float("-inf"))  # NaN in every row of a set with padding
        for i, block in enumerate(self.blocks):
            x = checkpoint(block, x, pad, use_reentrant=i % 2 == 0)
        aux = self.aux(x - x).log()
        return self.head(x), aux, x, t


def loss_fn(model, x, pad, y):
    logits, aux, h, t = model(x, pad)
    full = ~pad.any(1)
    loss = F.cross_entropy(logits[~pad], y[~pad]) + F.mse_loss(h[full], t[full])
    model.log = aux.mean().detach(), y[pad & ~pad].float().mean(), t.square().mean().sqrt()
    leaf = x.clone().requires_grad_()
    rough = (leaf - leaf.roll(5, 1)).square().sum(-1).sqrt()  # a full turn: root of zero
    return loss + 1e-3 * rough.mean()


def build():
    torch.manual_seed(0)
    pad = torch.zeros(3, 5, dtype=torch.bool)
    pad[1, 3:], pad[2] = True, True
    return Student(), (torch.randn(3, 5, 4), pad, torch.randint(0, 3, (3, 5))), loss_fn


def make_optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)
