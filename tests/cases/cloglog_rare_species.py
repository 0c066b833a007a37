"""Occupancy of a rare species with the complementary log-log link: exp(-rate) of a tiny rate is 1
in fp32, so log(1 - exp(-rate)) is log(0) although the rate is positive."""

import torch
from torch import nn

FIX = False
LOW = torch.float32
CASE = dict(
    id="cloglog_rare_species",
    source="",
    phase="forward",
    op="aten::log",
    node=None,
    marker="CULPRIT",
    cause="cancellation",
    precision="fp32",
    decoys=["aten::exp", "aten::rsub", "aten::where", "aten::mean"],
    fix="log(-expm1(-rate))",
)


class Occupancy(nn.Module):
    def __init__(self):
        super().__init__()
        self.habitat = nn.Linear(4, 1)
        self.region = nn.Embedding(3, 1)
        self.region.weight.data.copy_(torch.tensor([[0.0], [-1.0], [-22.0]]))

    def forward(self, x, region):
        return torch.exp((self.habitat(x) + self.region(region)).squeeze(-1))


def loss_fn(m, x, region, area, seen):
    rate = m(x, region) * area
    absent = torch.exp(-rate)
    found = -torch.expm1(-rate) if FIX else 1 - absent
    return -torch.where(seen, torch.log(found), -rate).mean()  # CULPRIT


def build():
    torch.manual_seed(0)
    region, seen = torch.tensor([0, 1, 2, 1]), torch.tensor([True, False, True, True])
    area = torch.tensor([1.0, 2.0, 0.5, 1.0]).to(LOW)
    return Occupancy().to(LOW), (torch.randn(4, 4).to(LOW), region, area, seen), loss_fn
