"""Decoder with a Beta likelihood of grey values in [0, 1]: a black pixel lies on the edge of the
support, where a Beta density with a < 1 has its pole."""

import torch
from torch import nn
from torch.distributions import Beta

FIX = False
CASE = dict(
    id="beta_likelihood_black_pixel",
    source="",
    phase="forward",
    op="aten::xlogy",
    node=None,
    marker="CULPRIT",
    cause="pole",
    precision="any",
    decoys=["aten::lgamma", "aten::softplus", "aten::sum", "aten::mean"],
    fix="grey values inside (0, 1)",
)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(2, 6)
        self.shape = nn.Linear(6, 8)

    def forward(self, z):
        raw = self.shape(torch.relu(self.hidden(z)))
        a, b = nn.functional.softplus(raw).chunk(2, -1)
        return Beta(a + 0.01, b + 0.01)


def loss_fn(m, z, grey):
    if FIX:
        grey = grey * 0.998 + 0.001
    return -m(z).log_prob(grey).mean()  # CULPRIT


def build():
    torch.manual_seed(0)
    grey = torch.rand(3, 4) * 0.8 + 0.1
    grey[1, 2] = 0.0
    return Decoder(), (torch.randn(3, 2), grey), loss_fn
