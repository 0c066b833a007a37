"""Healthy: sequences padded with NaN, which is replaced before the recurrent network reads it."""

import torch
import torch.nn.functional as F
from torch import nn

CASE = dict(
    id="ctl_nan_padded_sequences",
    source="",
    phase="none",
    op=None,
    node=None,
    marker="CULPRIT",
    cause="healthy",
    precision="any",
    decoys=[],
    fix="",
)


class M(nn.Module):
    def __init__(self):
        super().__init__()
        self.g = nn.GRU(3, 8, batch_first=True)
        self.o = nn.Linear(8, 2)

    def forward(self, x, n):
        x = torch.where(torch.isnan(x), 0.0, x)
        p = nn.utils.rnn.pack_padded_sequence(x, n, batch_first=True)
        _, h = self.g(p)
        return self.o(h[-1])


def build():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 3)
    x[1, 4:] = torch.nan
    x[2, 2:] = torch.nan
    return (
        M(),
        (x, torch.tensor([5, 4, 2]), torch.tensor([0, 1, 1])),
        lambda m, x, n, y: F.cross_entropy(m(x, n), y),
    )


def make_optimizer(model):
    return torch.optim.AdamW(model.parameters())
