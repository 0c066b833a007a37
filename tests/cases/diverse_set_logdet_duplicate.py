"""Determinantal point process for diverse recommendations: the observed set shows one item twice,
the kernel of the set is singular, and its log-determinant is -inf."""

import torch
from torch import nn

FIX = False
CASE = dict(
    id="diverse_set_logdet_duplicate",
    source="",
    phase="forward",
    op="aten::_linalg_slogdet",
    node=None,
    marker="CULPRIT",
    cause="singular_matrix",
    precision="any",
    also=["aten::logdet", "aten::linalg_slogdet", "aten::slogdet"],
    decoys=["aten::embedding", "aten::mm", "aten::sub", "aten::neg"],
    fix="a small multiple of the identity on the kernel",
)


class Diverse(nn.Module):
    def __init__(self):
        super().__init__()
        self.item = nn.Embedding(7, 4)
        self.quality = nn.Embedding(7, 1)

    def kernel(self, ids):
        f = self.item(ids) * torch.exp(0.5 * self.quality(ids))
        jitter = 1e-4 if FIX else 0.0
        return f @ f.t() + jitter * torch.eye(len(ids))

    def forward(self, chosen):
        whole = torch.logdet(self.kernel(torch.arange(7)) + torch.eye(7))
        return torch.logdet(self.kernel(chosen)) - whole  # CULPRIT


def build():
    torch.manual_seed(0)
    return Diverse(), (torch.tensor([2, 5, 2]),), lambda m, chosen: -m(chosen)
