"""Poisson regression of counts with a step size that is too large: the log-rate swings further with
every update until its exponential overflows, in the forward of a later step."""

import torch
from torch import nn

FIX = False
CASE = dict(
    id="poisson_rate_diverges",
    source="",
    phase="forward",
    op="aten::exp",
    node=None,
    marker="CULPRIT",
    cause="divergence",
    precision="any",
    steps=4,
    fail_step=2,
    also=["aten::poisson_nll_loss", "optimizer"],
    decoys=["aten::addmm", "aten::mul", "aten::sub", "aten::add_"],
    fix="a smaller learning rate, or clipping",
)


class Rate(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x):
        return self.linear(x).squeeze(-1)


def loss_fn(m, x, count):
    return nn.functional.poisson_nll_loss(m(x), count, log_input=True)  # CULPRIT


def build():
    torch.manual_seed(0)
    x = torch.randn(16, 2)
    return (
        Rate(),
        (x, torch.poisson(torch.exp(0.5 * x[:, 0]), torch.Generator().manual_seed(1))),
        loss_fn,
    )


def make_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.05 if FIX else 8.0, momentum=0.9)
