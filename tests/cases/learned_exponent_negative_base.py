"""A learned exponent: x ** 2 is finite where x is negative, and the derivative by the exponent takes
the logarithm of x."""

import torch
from torch import nn

FIX = False
CASE = dict(
    id="learned_exponent_negative_base",
    source="",
    phase="backward",
    op="aten::pow",
    node="PowBackward1",
    marker="CULPRIT",
    cause="domain_error",
    precision="any",
    decoys=["aten::mul"],
    fix="the exponent of |x|, with the sign put back",
)


class P(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Parameter(torch.full((3,), 2.0))
        self.lin = nn.Linear(3, 3)

    def forward(self, x):
        return (self.lin(x).abs() + 1e-6 if FIX else self.lin(x)) ** self.e  # CULPRIT


def build():
    torch.manual_seed(0)
    return P(), (torch.randn(5, 3),), lambda m, x: m(x).mean()
