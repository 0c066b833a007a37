"""Healthy: mixed precision with a GradScaler that starts too high; the first gradients overflow in
fp16, the step is skipped and the scale is halved until they fit."""

import torch
from torch import nn

CASE = dict(
    id="ctl_scaler_finds_its_scale",
    source="",
    phase="none",
    op=None,
    node=None,
    marker="CULPRIT",
    cause="healthy",
    precision="any",
    decoys=["aten::mm", "aten::mul", "aten::_amp_foreach_non_finite_check_and_unscale_"],
    fix="",
    steps=8,
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.outer(torch.relu(self.inner(x))).squeeze(-1)


def loss_fn(m, x, y):
    with torch.autocast("cpu", dtype=torch.float16):
        p = m(x)
    return nn.functional.mse_loss(p.float(), y)


def build():
    torch.manual_seed(0)
    return Net(), (torch.randn(16, 4), 2 * torch.randn(16)), loss_fn


def make_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.01)


def make_scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**20)


def train_step(model, batch, loss_fn, opt, scaler, step):
    opt.zero_grad()
    loss = loss_fn(model, *batch)
    yield "loss", loss
    scaler.scale(loss).backward()
    yield "grads", loss
    scaler.step(opt)
    scaler.update()
    yield "step", loss
