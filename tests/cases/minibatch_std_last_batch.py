"""Minibatch standard deviation as a feature of a discriminator: the last batch of the epoch holds
one sample, and the unbiased deviation of one value is 0/0."""

import warnings

import torch
from torch import nn

FIX = False
CASE = dict(
    id="minibatch_std_last_batch",
    source="",
    phase="forward",
    op="aten::std",
    node=None,
    marker="CULPRIT",
    cause="empty_reduction",
    precision="any",
    steps=4,
    fail_step=2,
    decoys=["aten::cat", "aten::mean", "aten::addmm", "aten::expand"],
    fix="correction=0, or drop_last",
)


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(7, 1)

    def forward(self, x):
        h = nn.functional.leaky_relu(self.body(x), 0.2)
        with warnings.catch_warnings():  # torch warns, and so training scripts silence it
            warnings.simplefilter("ignore")
            spread = h.std(0, correction=0 if FIX else 1)  # CULPRIT
        return self.head(torch.cat([h, spread.mean().expand(len(h), 1)], 1)).squeeze(-1)


def batch_at(step):
    g = torch.Generator().manual_seed(step)
    count = (5, 5, 1, 5)[step]
    return torch.randn(count, 4, generator=g), torch.ones(count)


def build():
    torch.manual_seed(0)
    loss = nn.functional.binary_cross_entropy_with_logits
    return Discriminator(), batch_at(0), lambda m, x, y: loss(m(x), y)


def make_optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=2e-4)
