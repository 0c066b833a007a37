"""Distance on the hyperboloid by acosh of the Lorentz product: for a pair made of one point twice
the product is exactly 1, where acosh is 0 and its derivative infinite."""

import torch
from torch import nn

FIX = False
CASE = dict(
    id="lorentz_distance_same_point",
    source="",
    phase="backward",
    op="aten::acosh",
    node="AcoshBackward0",
    marker="CULPRIT",
    cause="infinite_derivative_at_boundary",
    precision="any",
    decoys=["aten::clamp", "aten::sqrt", "aten::embedding", "aten::mul"],
    fix="clamp to 1 + 1e-6",
)


class Lorentz(nn.Module):
    def __init__(self):
        super().__init__()
        self.space = nn.Embedding(5, 2)
        self.space.weight.data[3] = torch.tensor([0.75, 0.0])  # time is exactly 1.25

    def forward(self, i, j):
        u, v = self.space(i), self.space(j)
        time = torch.sqrt(1 + u.square().sum(-1)) * torch.sqrt(1 + v.square().sum(-1))
        product = (time - (u * v).sum(-1)).clamp(min=1 + 1e-6 if FIX else 1.0)
        return torch.acosh(product)  # CULPRIT


def build():
    torch.manual_seed(0)
    batch = (torch.tensor([0, 3, 2]), torch.tensor([1, 3, 4]), torch.tensor([1.0, 0.5, 2.0]))
    return Lorentz(), batch, lambda m, i, j, d: (m(i, j) - d).pow(2).mean()
