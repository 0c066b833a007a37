"""Group normalisation ported with eps=0: a blank satellite tile has no variance in any group, so
that the layer computes 0 * inf.  Weight conversion between frameworks."""

import torch
from torch import nn

FIX = False
CASE = dict(
    id="group_norm_blank_tile",
    source="",
    phase="forward",
    op="aten::native_group_norm",
    node=None,
    marker="CULPRIT",
    cause="zero_denominator_forward",
    precision="any",
    also=["aten::group_norm"],
    decoys=["aten::convolution", "aten::gelu", "aten::_log_softmax", "aten::mean"],
    fix="eps=1e-5",
)


class Tile(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, bias=False)
        self.norm = nn.GroupNorm(2, 4, eps=1e-5 if FIX else 0.0)
        self.land = nn.Linear(4, 3)

    def forward(self, x):
        h = self.stem(x)
        h = self.norm(h)  # CULPRIT
        return self.land(nn.functional.gelu(h).mean((2, 3)))


def build():
    torch.manual_seed(0)
    x = torch.randn(3, 2, 6, 6)
    x[1] = 0.0  # outside the swath
    return (
        Tile(),
        (x, torch.tensor([0, 2, 1])),
        lambda m, x, y: nn.functional.cross_entropy(m(x), y),
    )
