"""Healthy: the peak signal-to-noise ratio of a perfect copy is inf, a relative error x/0; both
are metrics under no_grad.  A penalty on the norms of weights at 0 has a backward of its own."""

import torch
from torch import nn

CASE = dict(
    id="ctl_psnr_metric_infinite",
    source="",
    phase="none",
    op=None,
    node=None,
    marker="CULPRIT",
    cause="healthy",
    precision="any",
    decoys=["aten::reciprocal", "aten::div", "aten::log10", "aten::mul"],
    fix="",
    steps=2,
)


class Restore(nn.Module):
    def __init__(self):
        super().__init__()
        self.residual = nn.Conv2d(1, 1, 3, padding=1)
        nn.init.zeros_(self.residual.weight)
        nn.init.zeros_(self.residual.bias)
        self.seen = []

    def forward(self, x):
        return x + self.residual(x)


def loss_fn(m, x, y):
    p = m(x)
    with torch.no_grad():
        mse = (p - y).square().mean((1, 2, 3))
        psnr = 10 * torch.log10(1 / mse)
        m.seen = [psnr, (p - y).abs().sum() / y[0].sum()]
    return nn.functional.l1_loss(p, y) + 1e-3 * p.diff(dim=-1).abs().mean()


def build():
    torch.manual_seed(0)
    y = torch.rand(2, 1, 6, 6)
    y[0] = 0.0
    x = y.clone()
    x[1] += 0.1 * torch.randn(1, 6, 6)
    return Restore(), (x, y), loss_fn


def make_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def train_step(model, batch, loss_fn, opt, scaler, step):
    opt.zero_grad()
    loss = loss_fn(model, *batch)
    yield "loss", loss
    loss.backward()
    penalty = 1e-4 * sum(p.norm() for p in model.parameters())
    penalty.backward()
    yield "grads", loss
    opt.step()
    yield "step", loss
