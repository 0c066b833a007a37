"""Healthy: a detector returns a dict of heads; the width head takes the logarithm of negative
numbers and is NaN, but this run trains the class head only, with the width head frozen."""

import torch
from torch import nn

CASE = dict(
    id="ctl_unused_head_is_nan",
    source="",
    phase="none",
    op=None,
    node=None,
    marker="CULPRIT",
    cause="healthy",
    precision="any",
    decoys=["aten::log", "aten::sub", "aten::div", "aten::addmm"],
    fix="",
    steps=2,
)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 6)
        self.kind, self.width = nn.Linear(6, 3), nn.Linear(6, 2)
        self.width.requires_grad_(False)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        width = self.width(h)
        return {"kind": self.kind(h), "width": torch.log(width), "ratio": width / (width - width)}


def build():
    torch.manual_seed(0)
    batch = (torch.randn(4, 5), torch.tensor([0, 2, 1, 1]))
    return Heads(), batch, lambda m, x, y: nn.functional.cross_entropy(m(x)["kind"], y)


def make_optimizer(model):
    return torch.optim.RMSprop([p for p in model.parameters() if p.requires_grad], lr=1e-3)
