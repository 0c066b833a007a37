"""Edge-aware depth loss with torch.hypot of the two finite differences: in a flat region both are
0, the forward is 0, and the backward of hypot divides 0 by 0."""

import torch
from torch import nn

FIX = False
CASE = dict(
    id="sobel_edge_flat_region",
    source="",
    phase="backward",
    op="aten::hypot",
    node="HypotBackward0",
    marker="CULPRIT",
    cause="zero_denominator_in_backward",
    precision="any",
    decoys=["aten::sub", "aten::slice", "aten::mul", "aten::abs"],
    fix="sqrt(dx^2 + dy^2 + eps)",
)


class Depth(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.shift = nn.Parameter(torch.tensor(0.1))

    def forward(self, image):
        depth = self.gain * image + self.shift
        dx = depth[:, :-1, 1:] - depth[:, :-1, :-1]
        dy = depth[:, 1:, :-1] - depth[:, :-1, :-1]
        if FIX:
            edge = torch.sqrt(dx * dx + dy * dy + 1e-12)
        else:
            edge = torch.hypot(dx, dy)  # CULPRIT
        return {"depth": depth, "edge": edge}


def loss_fn(m, image, target):
    out = m(image)
    return (out["depth"] - target).abs().mean() + 0.1 * out["edge"].mean()


def build():
    torch.manual_seed(0)
    image = torch.rand(2, 6, 6)
    image[1, 1:4, 2:5] = 0.5
    return Depth(), (image, torch.rand(2, 6, 6)), loss_fn
