"""DETR-like detector with denoising queries that start as exact copies of their targets.

A target without height has no area, so the overlap divides 0 by 0.  Before that, in the same
forward: the frozen teacher's padded rows are softmaxed to NaN and sliced off, the padding fraction
divides by zero and is selected away, and a logged mean over no boxes is NaN.
"""

import torch
from torch import nn
from torch.nn import functional as F

FIX = False
CASE = dict(
    id="large_detr_degenerate_union",
    source="",
    phase="forward",
    op="aten::div",
    node=None,
    marker="CULPRIT",
    cause="zero_denominator_forward",
    precision="any",
    kinds=[1, 10],
    decoys=["aten::_softmax", "aten::mean", "aten::sub", "aten::bmm"],
    fix="clamp the union",
    module="criterion",
    occurrence=3,
)


class Attention(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(d, d)

    def forward(self, x, memory, pad=None):
        k, v = self.kv(memory).chunk(2, -1)
        scores = self.q(x) @ k.transpose(-1, -2) / k.shape[-1] ** 0.5
        if pad is not None:
            both = pad[:, None, :] | pad[:, :, None]
            scores = scores.masked_fill(both, float("-inf"))
        return self.out(scores.softmax(-1) @ v)


class Layer(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.own, self.cross = Attention(d), Attention(d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.n1, self.n2, self.n3 = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x, memory, pad=None):
        x = x + self.own(self.n1(x), self.n1(x), pad)
        x = x + self.cross(self.n2(x), memory)
        return x + self.mlp(self.n3(x))


class Criterion(nn.Module):
    def overlap(self, a, b):
        low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
        inter = (high - low).clamp(min=0).prod(-1)
        area = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1)
        union = area - inter
        if FIX:
            union = union.clamp(min=1e-6)
        return inter / union  # CULPRIT

    def forward(self, out, boxes, labels):
        fixed = torch.tensor([[0.1, 0.1, 0.1, 0.4]]).expand(2, 1, 4)
        with torch.no_grad():
            out["log"] = self.overlap(fixed, fixed).mean()  # NaN, only printed
            out["best"] = self.overlap(fixed, boxes[:, :1]).amax()
        loss = F.cross_entropy(out["logits"].flatten(0, 1), labels.flatten())
        for pred in out["boxes"]:
            loss = loss + F.l1_loss(pred, boxes) + (1 - self.overlap(pred, boxes)).mean()
        return loss


class Detr(nn.Module):
    def __init__(self, d=16):
        super().__init__()
        self.teacher = Layer(d).requires_grad_(False)
        self.encoder = nn.ModuleList(Layer(d) for _ in range(2))
        self.decoder = nn.ModuleList(Layer(d) for _ in range(3))
        self.embed, self.cls = nn.Linear(4, d), nn.Linear(d, 3)
        self.delta = nn.ModuleList(nn.Linear(d, 4) for _ in range(3))
        for layer in self.delta:  # as deformable DETR does
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.criterion = Criterion()

    def forward(self, x, pad, noised):
        hint = self.teacher(x, x, pad)[:, :4].mean(1, keepdim=True)
        share = torch.where(pad.any(1), x.sum((1, 2)) / pad.sum(1), torch.zeros(len(x)))
        x = x + hint + 1e-3 * share[:, None, None]
        for layer in self.encoder:
            x = layer(x, x)
        h, ref, boxes = self.embed(noised), noised, []
        for layer, delta in zip(self.decoder, self.delta, strict=True):
            h = layer(h, x)
            ref = ref + delta(h)
            boxes.append(ref)
        return {"logits": self.cls(h), "boxes": boxes}


def build():
    torch.manual_seed(0)
    pad = torch.zeros(2, 6, dtype=torch.bool)
    pad[1, 4:] = True
    low = torch.rand(2, 3, 2) * 0.4
    boxes = torch.cat([low, low + 0.2], -1)
    boxes[1, 2, 3] = boxes[1, 2, 1]  # no height
    labels = torch.tensor([[0, 1, 2], [1, 0, 2]])
    batch = (torch.randn(2, 6, 16), pad, boxes, labels)
    return Detr(), batch, lambda m, x, p, b, y: m.criterion(m(x, p, b), b, y)
