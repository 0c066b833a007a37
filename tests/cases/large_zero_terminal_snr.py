"""A schedule that was rescaled to a terminal signal of zero: the step that predicts the clean sample
divides by it.  The logarithm of the signal-to-noise ratio is only noted down."""

import math

import torch
import torch.nn.functional as F
from torch import nn

FIX = False
CASE = dict(
    id="large_zero_terminal_snr",
    source="",
    phase="forward",
    op="aten::div",
    node=None,
    marker="CULPRIT",
    cause="zero_denominator_forward",
    precision="any",
    decoys=["aten::mul", "aten::sub"],
    fix="the clean sample from v",
    also=["aten::reciprocal"],
)


class Res(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n, self.a, self.b, self.t = (
            nn.GroupNorm(2, c),
            nn.Conv1d(c, c, 3, padding=1),
            nn.Conv1d(c, c, 3, padding=1),
            nn.Linear(8, c),
        )

    def forward(self, x, t):
        h = self.a(F.silu(self.n(x))) + self.t(t)[..., None]
        return x + self.b(F.silu(h))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Conv1d(1, 8, 3, padding=1), nn.Conv1d(8, 1, 3, padding=1)
        self.down = nn.ModuleList(Res(8) for _ in range(2))
        self.up = nn.ModuleList(Res(8) for _ in range(2))

    def embed(self, t):
        f = torch.exp(-math.log(1000) * torch.arange(4) / 4)
        return torch.cat([(t[:, None] * f).sin(), (t[:, None] * f).cos()], -1)

    def forward(self, x, t):
        e = self.embed(t)
        h = self.inp(x)
        skips = []
        for r in self.down:
            h = r(h, e)
            skips.append(h)
            h = F.avg_pool1d(h, 2)
        for r in self.up:
            h = F.interpolate(h, scale_factor=2) + skips.pop()
            h = r(h, e)
        return self.out(h)


class Diffusion(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = UNet()
        betas = torch.linspace(1e-4, 0.02, 50)
        ab = torch.cumprod(1 - betas, 0)
        s = ab.sqrt()
        s = (s - s[-1]) * s[0] / (s[0] - s[-1])
        self.register_buffer("ab", s**2)

    def forward(self, x0, t, n):
        ab = self.ab[t][:, None, None]
        xt = ab.sqrt() * x0 + (1 - ab).sqrt() * n
        v = self.net(xt, t.float())
        return xt, v, ab


def build():
    torch.manual_seed(0)

    def loss_fn(m, x0, t, n):
        xt, v, ab = m(x0, t, n)
        eps = (1 - ab).sqrt() * xt + ab.sqrt() * v
        with torch.no_grad():
            log_snr = torch.log(m.ab / (1 - m.ab))
            m.snr_stats = (log_snr.min(), log_snr.max())
        x0_hat = ab.sqrt() * xt - (1 - ab).sqrt() * v
        if not FIX:
            x0_hat = (xt - (1 - ab).sqrt() * eps) / ab.sqrt()  # CULPRIT
        snr = ab / (1 - ab)
        w = torch.minimum(snr, torch.tensor(5.0))
        return (w * (x0_hat - x0).square()).mean() + F.mse_loss(eps, n)

    return (
        Diffusion(),
        (torch.randn(3, 1, 16), torch.tensor([3, 20, 49]), torch.randn(3, 1, 16)),
        loss_fn,
    )
