"""A hook that gives every sample a gradient of length 1: once the margin of a sample is met, its
gradient is exactly 0 and the hook divides 0 by 0.  Balancing of tasks or samples by hooks."""

import torch
from torch import nn

FIX = False
CASE = dict(
    id="normalised_gradient_hook",
    source="",
    phase="backward",
    op="aten::div",
    node="TanhBackward0",
    marker="CULPRIT",
    cause="zero_denominator_in_backward",
    precision="any",
    in_hook=True,
    also=["aten::tanh"],
    decoys=["aten::linalg_vector_norm", "aten::relu", "aten::addmm", "aten::tanh_backward"],
    fix="g / (norm + 1e-8)",
)


def unit(g):
    size = g.norm(dim=-1, keepdim=True)
    if FIX:
        size = size + 1e-8
    return g / size  # CULPRIT


class Verifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(5, 4)
        self.score = nn.Linear(4, 1)

    def forward(self, x):
        h = torch.tanh(self.encode(x))
        h.register_hook(unit)
        return self.score(h).squeeze(-1)


def build():
    torch.manual_seed(0)
    batch = (torch.randn(4, 5), torch.tensor([1.0, 1.0, -1.0, -1.0]))
    offset = torch.tensor([0.0, 3.0, 0.0, 0.0])  # the second sample is won already
    return Verifier(), batch, lambda m, x, y: torch.relu(1 - y * m(x) - offset).sum()
