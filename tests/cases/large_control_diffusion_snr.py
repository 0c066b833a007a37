"""Healthy: a diffusion step with a zero-terminal schedule and an SDPA U-Net.

The signal-to-noise ratio is infinite at one end and its log is -inf at the other; the weights are
clamped and used as data.  Padding keys are masked with -inf, one row entirely, in fused attention;
the guidance branch without a label is NaN and indexed away; the loss per level has empty levels.
"""

import torch
from torch import nn
from torch.nn import functional as F

CASE = dict(
    id="large_control_diffusion_snr",
    source="",
    phase="none",
    op=None,
    node=None,
    marker="CULPRIT",
    cause="healthy",
    precision="any",
    kinds=[1, 12, 13],
    steps=3,
    decoys=["aten::div", "aten::log", "aten::mean", "aten::masked_fill", "aten::sub"],
    fix="",
)


class Res(nn.Module):
    def __init__(self, i, o, t):
        super().__init__()
        self.a, self.b = nn.Conv2d(i, o, 3, padding=1), nn.Conv2d(o, o, 3, padding=1)
        self.time, self.skip = nn.Linear(t, 2 * o), nn.Conv2d(i, o, 1)
        self.norm = nn.GroupNorm(2, o)

    def forward(self, x, t):
        scale, shift = self.time(t)[:, :, None, None].chunk(2, 1)
        h = self.norm(self.a(F.silu(x))) * (1 + scale) + shift
        return self.skip(x) + self.b(F.silu(h))


class Cross(nn.Module):
    def __init__(self, c, d):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(c, c), nn.Linear(d, 2 * c), nn.Linear(c, c)

    def forward(self, x, words, keep):
        b, c, h, w = x.shape
        q, (k, v) = self.q(x.flatten(2).mT), self.kv(words).chunk(2, -1)
        bias = torch.zeros(keep.shape).masked_fill(~keep, float("-inf")).unsqueeze(1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(b, h * w, -1))
        return x + self.out(y).mT.reshape(x.shape)


class Denoiser(nn.Module):
    def __init__(self, t=8, d=6):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(4, t), nn.SiLU(), nn.Linear(t, t))
        self.words = nn.Embedding(7, d)
        self.down = nn.ModuleList([Res(1, 4, t), Res(4, 8, t)])
        self.mid, self.cross = Res(8, 8, t), Cross(8, d)
        self.up = nn.ModuleList([Res(16, 4, t), Res(8, 4, t)])
        self.out = nn.Conv2d(4, 1, 1)

    def forward(self, x, level, tokens, keep):
        t = self.time(torch.cat([(level * k).sin() for k in (1, 2, 4, 8)], -1))
        skips = []
        for layer in self.down:
            x = layer(x, t)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.cross(self.mid(x, t), self.words(tokens), keep)
        for layer in self.up:
            x = layer(torch.cat([F.interpolate(x, scale_factor=2), skips.pop()], 1), t)
        return self.out(x)


def loss_fn(model, image, level, noise, tokens, keep):
    alpha = level.cos().clamp(min=0).where(level < 1.5, torch.zeros(()))  # zero-terminal
    sigma = (1 - alpha.square()).sqrt()
    snr = alpha.square() / sigma.square()
    weight = snr.clamp(max=5.0)
    a, s = alpha[:, :, None, None], sigma[:, :, None, None]
    v = model(a * image + s * noise, level, tokens, keep)
    loss = (v - (a * noise - s * image)).square().mean((1, 2, 3))
    with torch.no_grad():
        bucket = (level.squeeze(1) * 2).long()
        per = [loss[bucket == i].mean() for i in range(5)]
        guided = torch.where(keep.any(1), loss / keep.any(1), torch.zeros(()))
        model.log = per, snr.log10().mean(), guided, (snr - snr).mean()
    return (loss * (1 + weight.squeeze(1))).mean()


def build():
    torch.manual_seed(0)
    keep = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0], [1, 1, 1]]).bool()
    level = torch.tensor([[0.0], [0.4], [1.2], [1.6]])
    shape = (4, 1, 8, 8)
    batch = (torch.randn(shape), level, torch.randn(shape), torch.randint(0, 7, (4, 3)), keep)
    return Denoiser(), batch, loss_fn


def make_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)
