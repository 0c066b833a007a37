"""Healthy: the slope of a root at 0 is infinite, and the hook of the parameter takes it out."""

import torch
from torch import nn

CASE = dict(
    id="ctl_slope_repaired_by_hook",
    source="",
    phase="none",
    op=None,
    node=None,
    marker="CULPRIT",
    cause="healthy",
    precision="any",
    decoys=[],
    fix="",
)


class M(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.s = nn.Parameter(torch.tensor([0.0, 1.0, 4.0]))
        self.s.register_hook(lambda g: torch.nan_to_num(g, 0.0, 0.0, 0.0))

    def forward(self, x):
        return self.a(x) * self.s.sqrt()


def build():
    torch.manual_seed(0)
    return M(), (torch.randn(4, 3),), lambda m, x: m(x).square().mean()
