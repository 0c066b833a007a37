"""Segmentation logits enlarged eight times in fp16 under a loss scale: the backward of the
enlarging sums 64 finite gradients into each coarse cell and passes 65504."""

import torch
import torch.nn.functional as F
from torch import nn

FIX = False
LOW = torch.float16
CASE = dict(
    id="upsampled_mask_backward_half",
    source="",
    phase="backward",
    op="aten::upsample_nearest2d",
    node="UpsampleNearest2DBackward0",
    marker="CULPRIT",
    cause="overflow_low_precision",
    precision="fp16",
    also=["aten::upsample_nearest2d_backward"],
    decoys=["aten::convolution", "aten::binary_cross_entropy_with_logits", "aten::_to_copy"],
    fix="a smaller loss scale, or the enlarging in fp32",
)


class Masks(nn.Module):
    def __init__(self):
        super().__init__()
        self.coarse = nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, x):
        low = self.coarse(x)
        fine = F.interpolate(low, scale_factor=8, mode="nearest")  # CULPRIT
        return fine.squeeze(1)


def loss_fn(m, x, mask):
    scale = 16.0 if FIX else 8192.0
    return F.binary_cross_entropy_with_logits(m(x).float(), mask, reduction="sum") * scale


def build():
    torch.manual_seed(0)
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:24, 8:24] = 1
    return Masks().to(LOW), ((0.1 * torch.randn(1, 3, 4, 4)).to(LOW), mask), loss_fn
