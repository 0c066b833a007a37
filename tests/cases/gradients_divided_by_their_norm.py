"""Gradients that the step normalises by hand, parameter by parameter: behind a layer of dead units
they are exactly 0, and so is their norm."""

import torch
from torch import nn

FIX = False
CASE = dict(
    id="gradients_divided_by_their_norm",
    source="",
    phase="backward",
    op="aten::div",
    node=None,
    marker="CULPRIT",
    cause="zero_denominator_in_backward",
    precision="any",
    also=["aten::div_"],
    decoys=["aten::linalg_vector_norm", "aten::add_", "aten::addmm"],
    fix="a floor for the norm",
)


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].bias.fill_(-50.0)
    return model, (torch.randn(5, 3),), lambda m, x: (m(x) - 1).square().mean()


def make_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def train_step(model, batch, loss_fn, opt, scaler, step):
    opt.zero_grad()
    loss = loss_fn(model, *batch)
    yield "loss", loss
    loss.backward()
    for p in model.parameters():
        size = p.grad.norm()
        if FIX:
            size = size.clamp_min(1e-6)
        p.grad.copy_(p.grad / size)  # CULPRIT
    yield "grads", loss
    opt.step()
    yield "step", loss
