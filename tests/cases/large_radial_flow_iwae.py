"""An IWAE with a radial flow: one of 30 samples stands exactly at the centre, and the distance from
it has no slope there."""

import math

import torch
import torch.nn.functional as F
from torch import nn

FIX = False
CASE = dict(
    id="large_radial_flow_iwae",
    source="",
    phase="backward",
    op="aten::sqrt",
    node="SqrtBackward0",
    marker="CULPRIT",
    cause="infinite_derivative_at_boundary",
    precision="any",
    decoys=["aten::div", "aten::mul", "aten::log"],
    fix="an eps under the root",
    module="flows.0",
)


class Planar(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.u, self.w, self.b = (
            nn.Parameter(torch.randn(d) * 0.1),
            nn.Parameter(torch.randn(d)),
            nn.Parameter(torch.zeros(())),
        )

    def forward(self, z):
        act = torch.tanh(z @ self.w + self.b)
        psi = (1 - act.square())[..., None] * self.w
        return z + self.u * act[..., None], torch.log1p((psi @ self.u).clamp(min=-0.9))


class Radial(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.z0 = nn.Parameter(torch.zeros(d))
        self.a, self.b = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, z):
        diff = z - self.z0
        r = (diff.square().sum(-1, keepdim=True) + FIX * 1e-12).sqrt()  # CULPRIT
        h = 1 / (F.softplus(self.a) + r)
        bh = self.b * h
        return z + bh * diff, (
            (z.shape[-1] - 1) * torch.log1p(bh) + torch.log1p(bh - self.b * r * h * h)
        ).squeeze(-1)


class Vae(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(10, 24), nn.SiLU(), nn.Linear(24, 8))
        self.dec = nn.Sequential(nn.Linear(4, 24), nn.SiLU(), nn.Linear(24, 10))
        self.flows = nn.ModuleList([Radial(4), Planar(4)])

    def forward(self, x, eps):
        mu, lv = self.enc(x).chunk(2, -1)
        z0 = mu + (0.5 * lv).exp() * eps
        z, ld = z0, 0.0
        for f in self.flows:
            z, d = f(z)
            ld = ld + d
        logq = (-0.5 * (eps.square() + lv)).sum(-1) - ld
        return self.dec(z), z, logq


def build():
    torch.manual_seed(0)
    m = Vae()
    with torch.no_grad():
        m.enc[2].bias.zero_()
    x = torch.rand(6, 10).round()
    eps = torch.randn(5, 6, 4)
    with torch.no_grad():
        m.enc[0].bias.zero_()
    x[2] = 0
    eps[3, 2] = 0

    def loss_fn(m, x, eps):
        lo, z, logq = m(x, eps)
        logp = -F.binary_cross_entropy_with_logits(lo, x.expand_as(lo), reduction="none").sum(-1)
        logw = logp - 0.5 * z.square().sum(-1) - logq
        with torch.no_grad():
            ess = 1 / (logw.softmax(0).square().sum(0) - 1 / len(eps)).log()
            m.ess = ess
        return -(logw.logsumexp(0) - math.log(len(eps))).mean()

    return m, (x, eps), loss_fn
