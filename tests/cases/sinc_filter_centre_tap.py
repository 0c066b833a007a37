"""Learned sinc band filters for raw speech: the centre tap sin(0)/0 is overwritten by assignment,
and the backward of the division still returns 0/0 to the cut-off frequency."""

import math

import torch
from torch import nn

FIX = False
CASE = dict(
    id="sinc_filter_centre_tap",
    source="",
    phase="backward",
    op="aten::div",
    node="DivBackward0",
    marker="CULPRIT",
    cause="masked_branch_backward",
    precision="any",
    decoys=["aten::index_put_", "aten::copy_", "aten::sin", "aten::convolution", "aten::mul"],
    fix="torch.sinc, or a safe denominator",
)


class SincBand(nn.Module):
    def __init__(self):
        super().__init__()
        self.cut = nn.Parameter(torch.tensor([[0.05], [0.12], [0.3]]))
        self.register_buffer("n", torch.arange(-8.0, 9.0))

    def forward(self, wav):
        below = math.pi * self.n
        if FIX:
            below = torch.where(self.n == 0, torch.ones_like(below), below)
        taps = torch.sin(2 * math.pi * self.cut * self.n) / below  # CULPRIT
        taps[:, self.n == 0] = 2 * self.cut
        taps = taps * torch.hamming_window(17, periodic=False)
        return nn.functional.conv1d(wav[:, None], taps[:, None])


class Speech(nn.Module):
    def __init__(self):
        super().__init__()
        self.band, self.head = SincBand(), nn.Linear(3, 2)

    def forward(self, wav):
        return self.head(self.band(wav).abs().mean(-1))


def build():
    torch.manual_seed(0)
    batch = (torch.randn(2, 60), torch.tensor([0, 1]))
    return Speech(), batch, lambda m, x, y: nn.functional.cross_entropy(m(x), y)
