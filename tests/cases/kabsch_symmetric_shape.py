"""Rigid alignment by the SVD of a 3x3 correlation, with the gradient through the rotation: a
symmetric point set has three equal singular values, whose differences the backward divides by."""

import torch
from torch import nn

FIX = False
CASE = dict(
    id="kabsch_symmetric_shape",
    source="",
    phase="backward",
    op="aten::_linalg_svd",
    node="LinalgSvdBackward0",
    marker="CULPRIT",
    cause="degenerate_decomposition",
    precision="any",
    also=["aten::linalg_svd"],
    decoys=["aten::mm", "aten::bmm", "aten::transpose", "aten::mul"],
    fix="break the tie by a small diagonal, or detach the rotation",
)


class Points(nn.Module):
    def __init__(self):
        super().__init__()
        self.refine = nn.Linear(3, 3, bias=False)
        nn.init.eye_(self.refine.weight)

    def forward(self, source):
        return source + self.refine(source)


def loss_fn(m, source, target):
    p = m(source)
    correlation = p.transpose(-1, -2) @ target
    if FIX:
        correlation = correlation + torch.diag(torch.tensor([0.0, 0.1, 0.3]))
    u, _, vh = torch.linalg.svd(correlation)  # CULPRIT
    return (p @ (u @ vh) - target).abs().mean()


def build():
    torch.manual_seed(0)
    corners = torch.cat([torch.eye(3), -torch.eye(3)])
    turned = torch.stack([corners, corners[:, [1, 2, 0]]])
    return Points(), (corners.expand(2, 6, 3), turned), loss_fn
