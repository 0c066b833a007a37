"""Expected alignment of monotonic attention: the product of 1 - p runs through numbers that are
only nearly 0 before it is 0, and the previous alignment is divided by it.
Source: j-min/MoChA-pytorch#4."""

import torch
from torch import nn

FIX = False
CASE = dict(
    id="monotonic_attention_cumprod",
    source="j-min/MoChA-pytorch#4",
    phase="forward",
    op="aten::div",
    node=None,
    marker="CULPRIT",
    cause="underflow_to_zero",
    precision="fp32",
    decoys=["aten::cumsum", "aten::mul", "aten::cat", "aten::cumprod"],
    fix="clamp the cumulative product",
)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, state, memory):
        p = torch.sigmoid((self.query(state) * self.key(memory)).sum(-1) + 9.0)
        passed = torch.cat([torch.ones(1), torch.cumprod(1 - p, 0)[:-1]])
        if FIX:
            passed = passed.clamp(1e-10, 1.0)
        before = torch.full((len(memory),), 1 / len(memory))
        ratio = before / passed  # CULPRIT
        return p * passed * torch.cumsum(ratio, 0)


def build():
    torch.manual_seed(0)
    return Attention(), (torch.randn(6), torch.randn(24, 6)), lambda m, q, k: m(q, k).sum()
