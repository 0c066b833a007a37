"""The log-cosh regression loss written as log(cosh(e)): with an error of 120 degrees cosh leaves
fp32.  Regression on targets that were not scaled."""

import torch
from torch import nn

FIX = False
LOW = torch.float32
CASE = dict(
    id="log_cosh_raw_targets",
    source="",
    phase="forward",
    op="aten::cosh",
    node=None,
    marker="CULPRIT",
    cause="overflow_exp",
    precision="fp32",
    decoys=["aten::log", "aten::sub", "aten::mean", "aten::addmm"],
    fix="|e| + softplus(-2|e|) - log 2",
)


class Bearing(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 6), nn.ELU(), nn.Linear(6, 1))

    def forward(self, x):
        return self.net(x).squeeze(-1)


def loss_fn(m, x, angle):
    e = m(x) - angle
    if FIX:
        return (e.abs() + nn.functional.softplus(-2 * e.abs()) - 0.6931).mean()
    grown = torch.cosh(e)  # CULPRIT
    return torch.log(grown).mean()


def build():
    torch.manual_seed(0)
    angle = torch.tensor([10.0, -35.0, 120.0, 4.0])
    return Bearing().to(LOW), (torch.randn(4, 3).to(LOW), angle.to(LOW)), loss_fn
