"""Click-through model trained by Adagrad in pure fp16: a feature that is absent from the batch has
a zero gradient, eps=1e-10 is 0 in half precision, and its update is 0/0."""

import torch
from torch import nn

FIX = False
LOW = torch.float16
CASE = dict(
    id="adagrad_half_dead_feature",
    source="",
    phase="optimizer",
    op="aten::addcdiv_",
    node=None,
    marker="CULPRIT",
    cause="eps_underflow_low_precision",
    precision="fp16",
    also=["aten::_foreach_addcdiv_", "aten::_foreach_div_", "aten::div", "aten::_fused_adagrad_"],
    decoys=["aten::addmm", "aten::mul", "aten::softplus"],
    fix="eps=1e-4",
)


class Clicks(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 1)
        self.pairs = nn.Parameter(0.1 * torch.randn(6, 2))

    def forward(self, x):
        second = (x @ self.pairs).pow(2).sum(-1) - (x.pow(2) @ self.pairs.pow(2)).sum(-1)
        return self.linear(x).squeeze(-1) + 0.5 * second


def loss_fn(m, x, clicked):
    return nn.functional.softplus(-(2 * clicked - 1) * m(x).float()).mean()


def make_optimizer(model):
    return torch.optim.Adagrad(model.parameters(), lr=0.01, eps=1e-4 if FIX else 1e-10)


def train_step(model, batch, loss_fn, opt, scaler, step):
    opt.zero_grad()
    loss = loss_fn(model, *batch)
    yield "loss", loss
    loss.backward()
    yield "grads", loss
    opt.step()  # CULPRIT
    yield "step", loss


def build():
    torch.manual_seed(0)
    x = (torch.rand(4, 6) > 0.4).to(LOW)
    x[:, 5] = 0
    return Clicks().to(LOW), (x, torch.tensor([1.0, 0.0, 1.0, 1.0])), loss_fn
