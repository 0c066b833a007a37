"""Pairwise ranking loss over padded result lists: padding scores -inf, and the difference of two
padded documents is -inf - -inf."""

import torch
from torch import nn

FIX = False
CASE = dict(
    id="ranking_padded_documents",
    source="",
    phase="forward",
    op="aten::sub",
    node=None,
    marker="CULPRIT",
    cause="inf_minus_inf_or_zero_times_inf",
    precision="any",
    decoys=["aten::masked_fill", "aten::softplus", "aten::mul", "aten::sum"],
    fix="mask the pairs, with finite scores",
)


class Ranker(nn.Module):
    def __init__(self):
        super().__init__()
        self.match = nn.Bilinear(3, 4, 1)

    def forward(self, query, docs):
        query = query[:, None].expand(-1, docs.shape[1], -1).contiguous()
        return self.match(query, docs).squeeze(-1)


def loss_fn(m, query, docs, grade, real):
    s = m(query, docs).masked_fill(~real, 0.0 if FIX else float("-inf"))
    gap = s[:, :, None] - s[:, None, :]  # CULPRIT
    better = (grade[:, :, None] > grade[:, None, :]).float()
    return (better * nn.functional.softplus(-gap)).sum() / better.sum()


def build():
    torch.manual_seed(0)
    grade = torch.tensor([[2, 0, 1, -1, -1], [1, 0, 0, 0, 2]])
    return Ranker(), (torch.randn(2, 3), torch.randn(2, 5, 4), grade, grade >= 0), loss_fn
