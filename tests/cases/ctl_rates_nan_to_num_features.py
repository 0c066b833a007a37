"""Healthy: conversion rates of shops are clicks / visits with 0/0 for a closed shop; nan_to_num on
these plain features, which need no gradient, comes before the model."""

import torch
from torch import nn

CASE = dict(
    id="ctl_rates_nan_to_num_features",
    source="",
    phase="none",
    op=None,
    node=None,
    marker="CULPRIT",
    cause="healthy",
    precision="any",
    decoys=["aten::div", "aten::nan_to_num", "aten::log", "batch[0]"],
    fix="",
)


class Sales(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 6), nn.Mish(), nn.Linear(6, 1))

    def forward(self, clicks, visits):
        rate = torch.nan_to_num(clicks / visits, nan=0.0)
        size = torch.nan_to_num(torch.log(visits), neginf=-1.0)
        x = torch.stack([rate, size, (visits == 0).float()], -1)
        return self.net(x).squeeze(-1)


def build():
    torch.manual_seed(0)
    visits = torch.tensor([10.0, 0.0, 250.0, 3.0, 0.0])
    batch = (torch.tensor([1.0, 0.0, 17.0, 3.0, 0.0]), visits, torch.randn(5))
    return Sales(), batch, lambda m, c, v, y: nn.functional.smooth_l1_loss(m(c, v), y)
