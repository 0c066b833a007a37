"""The inverse of a singular matrix, whose infinities nan_to_num takes out of the loss: the backward
multiplies by the inverse once more."""

import torch
from torch import nn

FIX = False
CASE = dict(
    id="inverse_hidden_by_nan_to_num",
    source="",
    phase="backward",
    op="aten::linalg_inv_ex",
    node="LinalgInvExBackward0",
    marker="CULPRIT",
    cause="singular_matrix",
    precision="any",
    decoys=["aten::nan_to_num"],
    fix="a loaded diagonal",
    also=["aten::_linalg_det", "aten::linalg_det"],
)


class D(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[1.0, 2.0], [2.0, 4.0]]))


def build():
    def loss_fn(m, t):
        load = FIX * 0.1 * torch.eye(2)
        inverse = torch.linalg.inv_ex(m.w + load)[0]  # CULPRIT
        return (inverse * t).nan_to_num(0, 0, 0).sum()

    return D(), (torch.ones(2, 2),), loss_fn
