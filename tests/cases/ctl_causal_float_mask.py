"""Healthy: a causal mask of -inf added to the scores of scaled_dot_product_attention; every query
sees itself, so that no row is empty."""

import torch
import torch.nn.functional as F
from torch import nn

CASE = dict(
    id="ctl_causal_float_mask",
    source="",
    phase="none",
    op=None,
    node=None,
    marker="CULPRIT",
    cause="healthy",
    precision="any",
    decoys=["aten::full", "aten::triu", "aten::_scaled_dot_product_flash_attention_for_cpu"],
    fix="",
)


class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 5)

    def forward(self, x):
        n = x.shape[1]
        mask = torch.full((n, n), float("-inf")).triu(1)
        q, k, v = self.qkv(x).view(len(x), n, 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


def build():
    torch.manual_seed(0)
    batch = (torch.randn(2, 6, 8), torch.randint(0, 5, (2, 6)))
    return Causal(), batch, lambda m, x, y: F.cross_entropy(m(x).flatten(0, 1), y.flatten())
