"""U-Net with two heads; a backward hook repairs the infinite gradient of the distance head.

The full backward hook of the distance head replaces its gradient by zeros where it is not finite,
so its roots of zero are harmless.  The segmentation loss, later in the backward, takes the log of
probabilities that underflowed to 0 at ignored pixels: masked in the forward, 0/0 in the backward.
"""

import torch
from torch import nn
from torch.nn import functional as F

FIX = False
CASE = dict(
    id="large_unet_repaired_by_hook",
    source="",
    phase="backward",
    op="aten::log",
    node="LogBackward0",
    marker="CULPRIT",
    cause="masked_branch_backward",
    precision="any",
    kinds=[1, 7],
    decoys=["aten::sqrt", "SqrtBackward0", "aten::_softmax", "aten::where", "BackwardHookFunction"],
    fix="log_softmax",
)


def repair(module, grad_input, grad_output):
    return tuple(torch.nan_to_num(g, 0.0, 0.0, 0.0) for g in grad_input)


class Double(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.a, self.b = nn.Conv2d(i, o, 3, padding=1), nn.Conv2d(o, o, 3, padding=1)
        self.na, self.nb = nn.GroupNorm(2, o), nn.GroupNorm(2, o)

    def forward(self, x):
        return F.silu(self.nb(self.b(F.silu(self.na(self.a(x))))))


class Distance(nn.Module):
    """Distance to the next boundary, with a root that has no slope at zero."""

    def forward(self, field):
        return field.square().sum(1).sqrt()


class Unet(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc = nn.ModuleList([Double(1, 4), Double(4, 8), Double(8, 8)])
        self.dec = nn.ModuleList([Double(16, 8), Double(16, 4)])
        self.seg, self.field = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 2, 1, bias=False)
        self.register_buffer("shape", torch.tensor([0.0, 1.0, 0.0])[:, None, None])
        self.distance = Distance()
        self.distance.register_full_backward_hook(repair)

    def forward(self, x, hole):
        skips = []
        for layer in self.enc:
            x = layer(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        for layer, skip in zip(self.dec, skips[:0:-1], strict=True):
            x = layer(torch.cat([F.interpolate(x, scale_factor=2), skip], 1))
        x = F.interpolate(x, scale_factor=2)
        field = self.field(x) * (~hole).unsqueeze(1)
        return self.seg(x) + 150.0 * self.shape * hole.unsqueeze(1), field


def focal(logits, target, valid):
    p = logits.softmax(1).gather(1, target.unsqueeze(1)).squeeze(1)
    if FIX:
        log = logits.log_softmax(1).gather(1, target.unsqueeze(1)).squeeze(1)
    else:
        log = p.log()  # CULPRIT
    nll = torch.where(valid, -log, torch.zeros_like(p))
    return ((1 - p.detach()) ** 2 * nll).sum() / valid.sum()


def loss_fn(model, image, target, hole):
    logits, field = model(image, hole)
    with torch.no_grad():
        onehot = F.one_hot(target, 3)
        recall = (onehot * 0).sum((0, 1, 2)) / (onehot * hole.unsqueeze(-1)).sum((0, 1, 2))
        model.metrics = recall
    loss = focal(logits, target, ~hole)
    distance = model.distance(field)  # last in the forward, first in the backward
    return loss + 0.1 * (distance - 0.3).abs().mean()


def build():
    torch.manual_seed(0)
    hole = torch.zeros(2, 16, 16, dtype=torch.bool)
    hole[0, 3:6, 3:6] = True
    target = torch.randint(0, 2, (2, 16, 16))
    target[hole] = 2  # the ignored class
    return Unet(), (torch.randn(2, 1, 16, 16), target, hole), loss_fn


def make_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)
