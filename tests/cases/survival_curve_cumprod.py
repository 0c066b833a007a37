"""Discrete-time survival model: the curve is a running product of (1 - hazard) over months, which
underflows to 0 after long follow-up, and the log-likelihood takes its logarithm."""

import torch
from torch import nn

FIX = False
LOW = torch.float32
CASE = dict(
    id="survival_curve_cumprod",
    source="",
    phase="forward",
    op="aten::log",
    node=None,
    marker="CULPRIT",
    cause="underflow_to_zero",
    precision="fp32",
    decoys=["aten::cumprod", "aten::gather", "aten::neg", "aten::mean"],
    fix="running sum of log(1 - hazard)",
)


class Survival(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(2, 4, batch_first=True)
        self.hazard = nn.Linear(4, 1)
        nn.init.constant_(self.hazard.bias, 1.0)

    def forward(self, x):
        return torch.sigmoid(self.hazard(self.rnn(x)[0]).squeeze(-1))


def loss_fn(m, x, month):
    stay = 1 - m(x)
    if FIX:
        log_curve = torch.log(stay).cumsum(-1)
    else:
        curve = torch.cumprod(stay, -1)
        log_curve = torch.log(curve)  # CULPRIT
    return -log_curve.gather(1, month[:, None]).mean()


def build():
    torch.manual_seed(0)
    x = torch.randn(3, 150, 2)
    return Survival().to(LOW), (x.to(LOW), torch.tensor([12, 149, 40])), loss_fn
