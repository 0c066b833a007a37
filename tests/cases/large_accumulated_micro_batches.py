"""Contrastive pair with three micro-batches, a GradScaler, two optimizers and tied weights.

The second micro-batch has a silent spectrogram, whose spread is a root of zero: NaN in the stem at
every loss scale.  In every micro-batch a frozen augmenter makes NaN for its input, no parameter.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

FIX = False
CASE = dict(
    id="large_accumulated_micro_batches",
    source="",
    phase="backward",
    op="aten::sqrt",
    node="SqrtBackward0",
    marker="CULPRIT",
    cause="infinite_derivative_at_boundary",
    precision="any",
    kinds=[10, 4, 1],
    module="audio",
    occurrence=2,
    decoys=["aten::pow", "aten::div", "aten::add_", "AccumulateGrad", "aten::mm"],
    fix="eps inside the root",
)


@dataclass
class Output:
    audio: torch.Tensor
    text: torch.Tensor
    spread: torch.Tensor


class Layer(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.attn = nn.MultiheadAttention(d, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x):
        h = self.n1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.n2(x))


class Audio(nn.Module):
    def __init__(self, d, shared):
        super().__init__()
        self.stem, self.shared, self.own = nn.Linear(6, d, bias=False), shared, Layer(d)

    def forward(self, x):
        h = self.stem(x)
        var = (h - h.mean(1, keepdim=True)).square().mean((1, 2))
        if FIX:
            var = var + 1e-6
        spread = var.sqrt()  # CULPRIT
        return self.own(self.shared(h)).mean(1), spread


class Pair(nn.Module):
    def __init__(self, d=12):
        super().__init__()
        self.shared = Layer(d)
        self.audio = Audio(d, self.shared)
        self.words, self.tail = nn.Embedding(15, d), Layer(d)
        self.frozen = nn.Linear(6, 6, bias=False).requires_grad_(False)

    def forward(self, x, ids):
        audio, spread = self.audio(x)
        text = self.tail(self.shared(self.words(ids))).mean(1)
        return Output(F.normalize(audio, dim=-1), F.normalize(text, dim=-1), spread)


def loss_fn(model, *batch):
    return sum(micro_loss(model, x, ids) for x, ids in zip(*batch, strict=True))


def micro_loss(model, x, ids):
    out = model(x, ids)
    logits = out.audio @ out.text.T / 0.1
    label = torch.arange(len(ids))
    loss = F.cross_entropy(logits, label) + F.cross_entropy(logits.T, label)
    with torch.no_grad():
        model.log = (x / x.abs().sum((1, 2), keepdim=True)).log().mean()
    leaf = torch.zeros(2, 6, requires_grad=True)
    nudge = model.frozen(leaf).square().sum(-1).sqrt()
    return loss + 1e-2 * out.spread.mean() + 1e-3 * nudge.mean()


def build():
    torch.manual_seed(0)
    x = torch.randn(3, 3, 5, 6)
    x[1, 2] = 0.0  # digital silence
    return Pair(), (x, torch.randint(0, 15, (3, 3, 4))), loss_fn


def make_scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**10)


def train_step(model, batch, loss_fn, opt, scaler, step):
    rest = [*model.words.parameters(), *model.tail.parameters()]
    both = [torch.optim.SGD(model.audio.parameters(), lr=1e-2), torch.optim.Adam(rest, lr=1e-3)]
    model.zero_grad()
    for x, ids in zip(*batch, strict=True):
        loss = micro_loss(model, x, ids) / len(batch[0])
        yield "loss", loss
        scaler.scale(loss).backward()
    for one in both:
        scaler.unscale_(one)
    yield "grads", loss
    for one in both:
        scaler.step(one)
    scaler.update()
    yield "step", loss
