"""Healthy: an interleaved rotary embedding is written into a torch.empty tensor through two views;
all of its memory, which holds NaN here, is overwritten before it is read."""

import torch
from torch import nn

CASE = dict(
    id="ctl_empty_overwritten_views",
    source="",
    phase="none",
    op=None,
    node=None,
    marker="CULPRIT",
    cause="healthy",
    precision="any",
    decoys=["aten::empty_like", "aten::copy_", "aten::slice", "aten::mul"],
    fix="",
)


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.proj(x)
        angle = torch.arange(x.shape[1])[:, None] / 10.0 ** torch.arange(4.0)
        torch.use_deterministic_algorithms(True)
        turned = torch.empty_like(h)
        torch.use_deterministic_algorithms(False)
        even, odd = h[..., ::2], h[..., 1::2]
        turned[..., ::2] = even * angle.cos() - odd * angle.sin()
        turned[..., 1::2] = even * angle.sin() + odd * angle.cos()
        return self.out(turned)


def build():
    torch.manual_seed(0)
    return (
        Rotary(),
        (torch.randn(2, 5, 6), torch.randn(2, 5, 3)),
        lambda m, x, y: (m(x) - y).square().mean(),
    )
