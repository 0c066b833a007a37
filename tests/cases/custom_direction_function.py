"""A hand-written Function for the direction of a vector: the forward guards the length by eps, the
backward forgot to, and a robot at rest gives 0/0."""

import torch
from torch import nn

FIX = False
CASE = dict(
    id="custom_direction_function",
    source="",
    phase="backward",
    op="custom:Direction",
    node="DirectionBackward",
    marker="CULPRIT",
    cause="custom_function_bug",
    precision="any",
    decoys=["aten::linalg_vector_norm", "aten::div", "aten::mm", "aten::mul"],
    fix="the same eps in the backward",
)


class Direction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return v / (v.norm(dim=-1, keepdim=True) + 1e-6)

    @staticmethod
    def backward(ctx, g):
        (v,) = ctx.saved_tensors
        size = v.norm(dim=-1, keepdim=True)
        if FIX:
            size = size + 1e-6
        u = v / size
        return (g - (g * u).sum(-1, keepdim=True) * u) / size


class Heading(nn.Module):
    def __init__(self):
        super().__init__()
        self.motion = nn.Linear(4, 2, bias=False)

    def forward(self, wheels):
        return Direction.apply(self.motion(wheels))  # CULPRIT


def build():
    torch.manual_seed(0)
    wheels = torch.randn(3, 4)
    wheels[1] = 0  # standing still
    goal = torch.tensor([[1.0, 0], [0, 1], [0.6, 0.8]])
    return Heading(), (wheels, goal), lambda m, w, g: (1 - (m(w) * g).sum(-1)).mean()
