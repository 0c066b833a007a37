"""Gradient accumulation over four micro-batches in pure fp16: each gradient is about 28000, and the
third addition into .grad passes 65504.  Training on small cards."""

import torch
from torch import nn

FIX = False
LOW = torch.float16
CASE = dict(
    id="accumulated_gradient_half",
    source="",
    phase="backward",
    op="aten::add_",
    node="torch::autograd::AccumulateGrad",
    marker="CULPRIT",
    cause="gradient_accumulation_overflow",
    precision="fp16",
    engine_add=True,
    steps=4,
    fail_step=2,
    also=["aten::add", "AccumulateGrad"],
    decoys=["aten::mv", "MvBackward0", "aten::mul", "aten::sum"],
    fix="divide each loss by the number of micro-batches",
)


class Demand(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.01, -0.02, 0.005]))

    def forward(self, x):
        return x @ self.weight


def batch_at(step):
    g = torch.Generator().manual_seed(step)
    return ((torch.rand(4, 3, generator=g) * 2 + 6.0).to(LOW),)


def loss_fn(m, x):
    return m(x).float().sum() * (256.0 if FIX else 1024.0)


def build():
    return Demand().to(LOW), batch_at(0), loss_fn


def make_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=1e-6)


def train_step(model, batch, loss_fn, opt, scaler, step):
    if step % 4 == 0:
        opt.zero_grad()
    loss = loss_fn(model, *batch)
    yield "loss", loss
    loss.backward()  # CULPRIT
    yield "grads", loss
    if step % 4 == 3:
        opt.step()
    yield "step", loss
