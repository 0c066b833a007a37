"""Targets that are missing are NaN, and are dropped after the square: the loss is finite, the
backward of the square multiplies 0 by NaN."""

import math

import torch
from torch import nn

FIX = False
CASE = dict(
    id="missing_targets_dropped_late",
    source="",
    phase="backward",
    op="aten::pow",
    node="PowBackward0",
    marker="CULPRIT",
    cause="masked_branch_backward",
    precision="any",
    decoys=["aten::index", "aten::sub", "aten::mean"],
    fix="drop them before",
)


def loss_fn(model, x, y):
    p = model(x)
    known = ~torch.isnan(y)
    if FIX:
        y = torch.where(known, y, 0.0)
    error = (p - y) ** 2  # CULPRIT
    return error[known].mean()


def build():
    torch.manual_seed(0)
    y = torch.randn(7, 3)
    y[2, 1] = y[5, 0] = math.nan
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return model, (torch.randn(7, 4), y), loss_fn
