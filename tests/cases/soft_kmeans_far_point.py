"""Soft k-means with responsibilities exp(-d^2 / s) / sum: for a point far from every centre all the
kernels underflow to 0 and the normalisation is 0/0.  Prototype layers, mixture models by hand."""

import torch
from torch import nn

FIX = False
LOW = torch.float32
CASE = dict(
    id="soft_kmeans_far_point",
    source="",
    phase="forward",
    op="aten::div",
    node=None,
    marker="CULPRIT",
    cause="underflow_to_zero",
    precision="fp32",
    decoys=["aten::_cdist_forward", "aten::exp", "aten::sum", "aten::mm"],
    fix="softmax(-d^2 / s)",
)


class Clusters(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 2)
        self.centres = nn.Parameter(torch.randn(4, 2))

    def forward(self, x):
        z = self.embed(x)
        energy = torch.cdist(z, self.centres).square() / 0.5
        if FIX:
            return z, torch.softmax(-energy, -1)
        kernel = torch.exp(-energy)
        return z, kernel / kernel.sum(-1, keepdim=True)  # CULPRIT


def loss_fn(m, x):
    z, r = m(x)
    return (z - r @ m.centres).pow(2).mean()


def build():
    torch.manual_seed(0)
    x = torch.randn(6, 3)
    x[4] = torch.tensor([14.0, -3.0, 9.0])
    return Clusters().to(LOW), (x.to(LOW),), loss_fn
