"""Healthy: dynamic time warping with a border of inf; every cell has a finite predecessor, and the
minimum never takes the border.  Coincident points meet in cdist, whose gradient there is 0."""

import torch
from torch import nn

CASE = dict(
    id="ctl_warping_inf_border",
    source="",
    phase="none",
    op=None,
    node=None,
    marker="CULPRIT",
    cause="healthy",
    precision="any",
    decoys=["aten::minimum", "aten::_cdist_forward", "CdistBackward0"],
    fix="",
)


class Motion(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, a, b):
        cost = torch.cdist(a * self.scale, b * self.scale)
        inf = torch.tensor(float("inf"))
        above = [torch.zeros(())] + [inf] * len(b)
        for row in cost:
            here = [inf]
            for j, c in enumerate(row):
                best = torch.minimum(torch.minimum(above[j], above[j + 1]), here[j])
                here.append(c + best)
            above = here
        return above[-1] / (len(a) + len(b))


def build():
    torch.manual_seed(0)
    a, b = torch.randn(4, 2), torch.randn(5, 2)
    b[0] = a[0]
    return Motion(), (a, b), lambda m, a, b: m(a, b)
