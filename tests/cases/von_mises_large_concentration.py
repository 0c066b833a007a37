"""Von Mises likelihood with the Bessel function itself: I0 grows as exp and leaves float32 at a
concentration of 92."""

import math

import torch
import torch.nn.functional as F
from torch import nn

FIX = False
CASE = dict(
    id="von_mises_large_concentration",
    source="",
    phase="forward",
    op="aten::i0",
    node=None,
    marker="CULPRIT",
    cause="overflow_exp",
    precision="fp32",
    decoys=["aten::log"],
    fix="i0e, which is scaled by exp(-kappa)",
    also=["aten::special_i0"],
)


def build():
    torch.manual_seed(0)
    m = nn.Linear(3, 2)
    with torch.no_grad():
        m.bias[1] = 120.0

    def loss_fn(m, x, ang):
        mu, kappa = m(x).unbind(-1)
        k = F.softplus(kappa)
        bessel = torch.special.i0e(k) if FIX else torch.i0(k)  # CULPRIT
        logz = torch.log(2 * math.pi * bessel) + FIX * k
        return (logz - F.softplus(kappa) * torch.cos(ang - mu)).mean()

    return m, (torch.randn(6, 3), torch.rand(6)), loss_fn
