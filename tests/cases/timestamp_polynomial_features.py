"""Trend of a time series by powers of the raw Unix time: 1.7e9 ** 5 is beyond fp32.  Tabular
pipelines in which the time was never scaled."""

import torch
from torch import nn

FIX = False
LOW = torch.float32
CASE = dict(
    id="timestamp_polynomial_features",
    source="",
    phase="forward",
    op="aten::pow",
    node=None,
    marker="CULPRIT",
    cause="overflow_fp32",
    precision="fp32",
    decoys=["aten::stack", "aten::mv", "aten::mul", "aten::mse_loss"],
    fix="time since the start, in years",
)


class Trend(nn.Module):
    def __init__(self, degree=5):
        super().__init__()
        self.degree = degree
        self.weight = nn.Parameter(torch.full((degree,), 0.1))
        self.register_buffer("scale", 10.0 ** -(9.5 * torch.arange(1.0, degree + 1)))

    def forward(self, t):
        if FIX:
            t = (t - 1.7e9) / 3.15e7
        powers = [torch.pow(t, k) for k in range(1, self.degree + 1)]  # CULPRIT
        return torch.stack(powers, -1) @ (self.weight * self.scale)


def build():
    torch.manual_seed(0)
    t = 1.7e9 + 86400.0 * torch.arange(10.0)
    batch = (t.to(LOW), torch.randn(10).to(LOW))
    return Trend().to(LOW), batch, lambda m, t, y: nn.functional.mse_loss(m(t), y)
