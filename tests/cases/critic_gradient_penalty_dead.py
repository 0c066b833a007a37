"""Gradient penalty of a critic: for a sample that no hidden unit sees the input gradient is 0, and
the square root of its squared length has an infinite derivative in the double backward."""

import torch
from torch import nn

FIX = False
CASE = dict(
    id="critic_gradient_penalty_dead",
    source="",
    phase="backward",
    op="aten::sqrt",
    node="SqrtBackward0",
    marker="CULPRIT",
    cause="infinite_derivative_at_boundary",
    precision="any",
    decoys=["aten::pow", "aten::threshold_backward", "aten::mm", "ThresholdBackwardBackward0"],
    fix="eps inside the square root",
)


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 6)
        self.outer = nn.Linear(6, 1)
        nn.init.uniform_(self.inner.weight, 0.1, 1.0)

    def forward(self, x):
        return self.outer(torch.relu(self.inner(x))).squeeze(-1)


def loss_fn(m, real, fake, mix):
    x = (mix * real + (1 - mix) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
    square = slope.pow(2).sum(-1)
    if FIX:
        square = square + 1e-12
    penalty = (torch.sqrt(square) - 1).pow(2).mean()  # CULPRIT
    return m(fake).mean() - m(real).mean() + 10 * penalty


def build():
    torch.manual_seed(0)
    real, fake = torch.rand(4, 3), torch.rand(4, 3)
    real[2], fake[2] = -9.0, -8.0
    return Critic(), (real, fake, torch.rand(4, 1)), loss_fn
