"""Healthy: the square root of a rectified number.  Its derivative at 0 is inf, but the backward of
the ReLU below selects 0 there, and so no parameter sees it (variance-stabilised counts)."""

import torch
from torch import nn

CASE = dict(
    id="ctl_sqrt_above_relu",
    source="",
    phase="none",
    op=None,
    node=None,
    marker="CULPRIT",
    cause="healthy",
    precision="any",
    decoys=["aten::sqrt", "SqrtBackward0", "aten::relu", "aten::threshold_backward"],
    fix="",
)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 6)
        self.out = nn.Linear(6, 1)

    def forward(self, x):
        rate = torch.relu(self.lin(x))
        return self.out(2 * torch.sqrt(rate))


def build():
    torch.manual_seed(0)
    batch = (torch.randn(5, 4), torch.randn(5, 1))
    return Counts(), batch, lambda m, x, y: nn.functional.mse_loss(m(x), y)
