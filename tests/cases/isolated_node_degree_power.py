"""Graph convolution that multiplies by degree ** -0.5: a node without an edge has degree 0, and
the power divides by it."""

import torch
from torch import nn

FIX = False
CASE = dict(
    id="isolated_node_degree_power",
    source="",
    phase="forward",
    op="aten::pow",
    node=None,
    marker="CULPRIT",
    cause="zero_denominator_forward",
    precision="any",
    decoys=["aten::mul", "aten::mm"],
    fix="self loops",
)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, edges):
        if FIX:
            edges = edges + torch.eye(len(edges))
        root = edges.sum(1).pow(-0.5)  # CULPRIT
        return (root[:, None] * edges * root[None]) @ self.linear(x)


def build():
    torch.manual_seed(0)
    edges = torch.zeros(4, 4)
    edges[[0, 1, 1, 2], [1, 0, 2, 1]] = 1.0
    return Layer(), (torch.randn(4, 4), edges), lambda m, x, a: m(x, a).square().mean()
