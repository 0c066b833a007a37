"""Healthy: state that is poisoned and never read, and a loss scaler that skips a step.

An input spike makes the running variance of a batch norm infinite, but the model never leaves
training mode; a moving average of a metric is NaN from the second step on; the last evaluation is
copied into a buffer.  The first loss scales overflow in half precision and are halved.
"""

import torch
from torch import nn
from torch.nn import functional as F

CASE = dict(
    id="large_control_unread_state",
    source="",
    phase="none",
    op=None,
    node=None,
    marker="CULPRIT",
    cause="healthy",
    precision="any",
    kinds=[3, 10],
    steps=6,
    decoys=["aten::native_batch_norm", "aten::mul", "aten::lerp_", "aten::var", "aten::div"],
    fix="",
)


class Block(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm1d(i), nn.Conv1d(i, o, 3, padding=1)
        self.skip = nn.Conv1d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x):
        x = self.norm(x)
        return self.skip(x) + F.gelu(self.conv(x))


class Wave(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = [2, 6, 6, 8, 8, 8]
        pairs = zip(sizes, sizes[1:], strict=False)
        self.blocks = nn.ModuleList(Block(i, o) for i, o in pairs)
        self.head = nn.Linear(8, 3)
        self.register_buffer("recall", torch.zeros(3))
        self.register_buffer("peak", torch.zeros(()))
        self.register_buffer("probe", torch.zeros(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        weight, bias = self.head.weight.half(), self.head.bias.half()
        return F.linear(x.mean(-1).half(), weight, bias).float()

    @torch.no_grad()
    def watch(self, x, logits, y):
        hit = torch.stack([(logits.argmax(-1) == y)[y == c].float().mean() for c in range(3)])
        self.recall.lerp_(hit, 0.1)  # NaN once a class was absent, and ever after
        self.peak.copy_(torch.maximum(self.peak, x.square().amax()))
        self.probe.copy_(hit.log() - hit.log())


def loss_fn(model, x, y):
    logits = model(x)
    model.watch(x, logits, y)
    with torch.no_grad():
        crest = x.abs().amax((1, 2)) / x.square().mean((1, 2)).sqrt()  # of silence: 0/0
        model.log = crest.mean(), crest.log()
    return F.cross_entropy(logits, y)


def batch_at(step):
    g = torch.Generator().manual_seed(step)
    x, y = torch.randn(6, 2, 12, generator=g), torch.arange(6) % 3
    x[5] = 0
    if step == 2:
        x[0, 1, 3] = 1e21
        y = y.clamp(max=1)
    return x, y


def build():
    torch.manual_seed(0)
    return Wave(), batch_at(0), loss_fn


def make_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def make_scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**21)
