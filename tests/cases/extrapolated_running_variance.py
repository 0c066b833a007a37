"""Weights extrapolated from two checkpoints, statistics and all: a variance has become negative,
and batch norm takes its root."""

import torch
from torch import nn

FIX = False
CASE = dict(
    id="extrapolated_running_variance",
    source="",
    phase="forward",
    op="aten::native_batch_norm",
    node=None,
    marker="CULPRIT",
    cause="domain_error",
    precision="any",
    also=["aten::batch_norm", "aten::_native_batch_norm_legit_no_training"],
    decoys=["aten::relu", "aten::mean", "aten::addmm"],
    fix="a floor for the variance",
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Linear(4, 1)
        old, new = torch.tensor([1.0, 0.8, 0.3, 2.0]), torch.tensor([1.1, 0.7, 0.1, 1.5])
        ahead = new + 0.6 * (new - old)
        self.norm.running_var.copy_(ahead.clamp_min(1e-3) if FIX else ahead)
        self.norm.eval()

    def forward(self, x):
        h = self.norm(self.conv(x))  # CULPRIT
        return self.out(torch.relu(h).mean(-1))


def build():
    torch.manual_seed(0)
    return Net(), (torch.randn(3, 2, 9),), lambda m, x: m(x).square().mean()
