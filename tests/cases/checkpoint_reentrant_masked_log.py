"""A masked logarithm in a reentrant checkpoint: the forward with a graph is run in the backward."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

FIX = False
CASE = dict(
    id="checkpoint_reentrant_masked_log",
    source="",
    phase="backward",
    op="aten::log",
    node="LogBackward0",
    marker="CULPRIT",
    cause="masked_branch_backward",
    precision="any",
    decoys=["aten::where"],
    fix="double where",
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(4, 4)
        self.o = nn.Linear(4, 1)

    def inner(self, x):
        h = self.l(x)
        h = h * (h > 0)
        safe = torch.where(h > 0, h, 1.0) if FIX else h
        return torch.where(h > 0, torch.log(safe), 0.0)  # CULPRIT

    def forward(self, x):
        return self.o(checkpoint(self.inner, x, use_reentrant=True))


def build():
    torch.manual_seed(0)
    return Block(), (torch.randn(4, 4, requires_grad=True),), lambda m, x: m(x).square().mean()
