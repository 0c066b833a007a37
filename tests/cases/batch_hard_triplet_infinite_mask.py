"""Batch-hard triplets: the mask of the same identity is multiplied by infinity instead of chosen
with, and 0 times infinity is NaN."""

import torch
import torch.nn.functional as F
from torch import nn

FIX = False
CASE = dict(
    id="batch_hard_triplet_infinite_mask",
    source="",
    phase="forward",
    op="aten::mul",
    node=None,
    marker="CULPRIT",
    cause="inf_minus_inf_or_zero_times_inf",
    precision="any",
    decoys=["aten::amin", "aten::sub"],
    fix="masked_fill",
)


def build():
    torch.manual_seed(0)
    m = nn.Linear(4, 4)

    def loss_fn(m, x, y):
        f = m(x)
        d = torch.cdist(f, f)
        same = (y[:, None] == y[None]).float()
        far = d.masked_fill(same > 0, torch.inf) if FIX else d + same * torch.inf  # CULPRIT
        neg = far.amin(1)
        return F.relu((d * same).amax(1) - neg + 1).mean()

    return m, (torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])), loss_fn
