"""Mean over the points of each cell by segment_reduce: a cell without points has a mean of 0/0."""

import torch
from torch import nn

FIX = False
CASE = dict(
    id="segment_mean_without_points",
    source="",
    phase="forward",
    op="aten::segment_reduce",
    node=None,
    marker="CULPRIT",
    cause="empty_reduction",
    precision="any",
    decoys=["aten::addmm", "aten::mm"],
    fix="a sum over at least one",
)


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.points, self.out = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x, sizes):
        h = torch.relu(self.points(x))
        if FIX:
            total = torch.segment_reduce(h, "sum", lengths=sizes, axis=0)
            return self.out(total / sizes.clamp_min(1)[:, None])
        return self.out(torch.segment_reduce(h, "mean", lengths=sizes, axis=0))  # CULPRIT


def build():
    torch.manual_seed(0)
    batch = (torch.randn(7, 3), torch.tensor([3, 0, 4]))
    return Cells(), batch, lambda m, x, n: m(x, n).square().mean()
