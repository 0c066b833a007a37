"""Two frozen probes read one trunk in fp16 under a static loss scale: the gradient from either is
finite, and their sum at the shared activation is above 65504."""

import torch
from torch import nn

FIX = False
LOW = torch.float16
CASE = dict(
    id="shared_trunk_fan_out_half",
    source="",
    phase="backward",
    op="aten::add",
    node="TanhBackward0",
    marker="CULPRIT",
    cause="gradient_accumulation_overflow",
    precision="fp16",
    engine_add=True,
    also=["aten::tanh", "aten::mm", "MmBackward0"],
    decoys=["aten::tanh_backward", "aten::sum", "AddmmBackward0"],
    fix="a smaller loss scale",
)


class Probe(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(4, 3)
        self.age = nn.Parameter(torch.full((3, 1), 1.25), requires_grad=False)
        self.mood = nn.Parameter(torch.full((3, 1), 1.5), requires_grad=False)

    def forward(self, x):
        return (h := torch.tanh(self.trunk(x))) @ self.age, h @ self.mood  # CULPRIT


def loss_fn(m, x):
    age, mood = m(x)
    scale = 2.0**4 if FIX else 2.0**15
    return (age.float().sum() + mood.float().sum()) * scale


def build():
    torch.manual_seed(0)
    return Probe().to(LOW), ((0.1 * torch.randn(2, 4)).to(LOW),), loss_fn
