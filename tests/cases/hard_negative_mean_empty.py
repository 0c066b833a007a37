"""Detector loss that averages over the hard negatives only: when all negatives are easy the
selection is empty and its mean is NaN.  Online hard example mining."""

import torch
import torch.nn.functional as F
from torch import nn

FIX = False
CASE = dict(
    id="hard_negative_mean_empty",
    source="",
    phase="forward",
    op="aten::mean",
    node=None,
    marker="CULPRIT",
    cause="empty_reduction",
    precision="any",
    decoys=["aten::index", "aten::binary_cross_entropy_with_logits", "aten::add", "aten::mul"],
    fix="sum / clamp(count, 1)",
)


class Anchors(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv1d(2, 4, 3, padding=1)
        self.objectness = nn.Conv1d(4, 1, 1)
        nn.init.constant_(self.objectness.bias, -4.0)  # prior of a rare object

    def forward(self, x):
        return self.objectness(F.silu(self.body(x))).squeeze(1)


def loss_fn(m, x, y):
    ce = F.binary_cross_entropy_with_logits(m(x), y, reduction="none")
    hard = ce[(y == 0) & (ce > 0.7)]
    if FIX:
        negative = hard.sum() / max(hard.numel(), 1)
    else:
        negative = hard.mean()  # CULPRIT
    return ce[y > 0].mean() + 0.5 * negative


def build():
    torch.manual_seed(0)
    y = torch.zeros(2, 10)
    y[0, 3] = y[1, 7] = 1
    return Anchors(), (0.3 * torch.randn(2, 2, 10), y), loss_fn
