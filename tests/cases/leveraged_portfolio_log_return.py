"""Growth-optimal portfolio: log1p of the day's return, which leverage pushes below -100 %.  The
weights are mapped over days by torch.func.vmap."""

import torch
from torch import nn

FIX = False
CASE = dict(
    id="leveraged_portfolio_log_return",
    source="",
    phase="forward",
    op="aten::log1p",
    node=None,
    marker="CULPRIT",
    cause="domain_error",
    precision="any",
    decoys=["aten::_softmax", "aten::mul", "aten::mean", "aten::neg"],
    fix="floor the return at -99 %",
)


class Trader(nn.Module):
    def __init__(self):
        super().__init__()
        self.policy = nn.Linear(3, 3)
        self.leverage = nn.Parameter(torch.tensor(6.0))

    def growth(self, signal, move):
        day = self.leverage * (torch.softmax(self.policy(signal), -1) * move).sum()
        if FIX:
            day = day.clamp(min=-0.99)
        return torch.log1p(day)  # CULPRIT

    def forward(self, signal, move):
        return torch.func.vmap(self.growth)(signal, move)


def build():
    torch.manual_seed(0)
    move = 0.02 * torch.randn(6, 3)
    move[3] = torch.tensor([-0.25, -0.31, -0.22])  # the crash
    return Trader(), (torch.randn(6, 3), move), lambda m, s, r: -m(s, r).mean()
