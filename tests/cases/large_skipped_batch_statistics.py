"""A convolution overflows in half precision and the program leaves that batch out without a word;
the running statistics behind it are poisoned, and show when the model is next evaluated.
Source: pytorch/pytorch#88474."""

import torch
from torch import nn
from torch.nn import functional as F

FIX = False
CASE = dict(
    id="large_skipped_batch_statistics",
    source="pytorch/pytorch#88474",
    phase="forward",
    op="aten::convolution",
    node=None,
    marker="CULPRIT",
    cause="overflow_low_precision",
    precision="fp16",
    steps=3,
    fail_step=2,
    also=["aten::mkldnn_convolution", "aten::conv1d"],
    decoys=["aten::native_batch_norm", "aten::relu", "aten::addmm"],
    fix="scale the input",
    module="stem.conv",
)


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm1d(6)
        with torch.no_grad():
            self.conv.weight.mul_(3.0)

    def forward(self, x):
        h = self.conv(x)  # CULPRIT
        return torch.relu(self.norm(h.float()))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = Stem()
        self.body = nn.Sequential(nn.Conv1d(6, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU())
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean(-1))


def make_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def make_scaler():
    return torch.amp.GradScaler("cpu", init_scale=256.0)


def batch_at(step):
    g = torch.Generator().manual_seed(step)
    loud = 14000.0 if step == 1 and not FIX else 1.0
    return loud * torch.randn(6, 2, 12, generator=g), torch.randint(0, 3, (6,), generator=g)


def loss_fn(model, x, y):
    with torch.autocast("cpu", torch.float16):
        z = model(x)
    return F.cross_entropy(z.float(), y)


def train_step(model, batch, loss_fn, opt, scaler, step):
    model.train(step < 2)
    opt.zero_grad()
    loss = loss_fn(model, *batch)
    if step < 2 and not torch.isfinite(loss):
        return
    yield "loss", loss
    scaler.scale(loss).backward()
    yield "grads", loss
    scaler.step(opt)
    scaler.update()
    yield "step", loss


def build():
    torch.manual_seed(0)
    return Net(), batch_at(0), loss_fn
