"""Window statistics of a barometer by E[x^2] - E[x]^2: near 101325 Pa the difference is negative
after rounding, and its square root is NaN.  Streaming feature normalisers."""

import torch
from torch import nn

FIX = False
LOW = torch.float32
CASE = dict(
    id="barometer_running_variance",
    source="",
    phase="forward",
    op="aten::sqrt",
    node=None,
    marker="CULPRIT",
    cause="cancellation",
    precision="fp32",
    decoys=["aten::div", "aten::sub", "aten::convolution", "aten::mse_loss"],
    fix="subtract the mean before squaring",
)


class Altimeter(nn.Module):
    def __init__(self):
        super().__init__()
        self.taps = nn.Conv1d(1, 3, 4)
        self.head = nn.Linear(3, 1)

    def forward(self, p):
        w = p.unfold(1, 8, 4)
        mean = w.mean(-1)
        if FIX:
            var = (w - mean[..., None]).pow(2).mean(-1)
        else:
            var = w.pow(2).mean(-1) - mean.pow(2)
        spread = torch.sqrt(var)  # CULPRIT
        level = (mean - 101325.0) / (spread + 1.0)
        return self.head(torch.relu(self.taps(level[:, None])).mean(-1))


def build():
    torch.manual_seed(0)
    p = 101325.0 + 0.3 * torch.randn(4, 64)
    batch = (p.to(LOW), torch.randn(4, 1).to(LOW))
    return Altimeter().to(LOW), batch, lambda m, p, y: nn.functional.mse_loss(m(p), y)
