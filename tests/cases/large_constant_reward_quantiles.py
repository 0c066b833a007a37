"""Advantages over the distance of two quantiles of the rewards: in the third batch every reward is
the same.  Explained variance and entropy are non-finite, or masked, in every batch."""

import torch
import torch.nn.functional as F
from torch import nn

FIX = False
CASE = dict(
    id="large_constant_reward_quantiles",
    source="",
    phase="forward",
    op="aten::div",
    node=None,
    marker="CULPRIT",
    cause="zero_denominator_forward",
    precision="any",
    decoys=["aten::sub", "aten::mul", "aten::exp"],
    fix="at least 1, as DreamerV3 has it",
    steps=3,
    fail_step=2,
)


class RunningScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("hi", torch.zeros(()))
        self.register_buffer("lo", torch.zeros(()))
        self.register_buffer("n", torch.zeros(()))

    @torch.no_grad()
    def update(self, r):
        self.lo.copy_(torch.quantile(r, 0.05))
        self.hi.copy_(torch.quantile(r, 0.95))
        self.n += 1

    def forward(self, a):
        return a / ((self.hi - self.lo).clamp(min=1.0) if FIX else self.hi - self.lo)  # CULPRIT


class AC(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.pi, self.v = nn.Linear(16, 3), nn.Linear(16, 1)
        self.scale = RunningScale()

    def forward(self, s):
        h = self.body(s)
        return self.pi(h), self.v(h).squeeze(-1)


def gae(r, v, done, g=0.99, lam=0.95):
    out, adv = [], torch.zeros(r.shape[1])
    for t in reversed(range(r.shape[0])):
        nxt = v[t + 1] if t + 1 < r.shape[0] else torch.zeros(r.shape[1])
        delta = r[t] + g * nxt * (1 - done[t]) - v[t]
        adv = delta + g * lam * (1 - done[t]) * adv
        out.append(adv)
    return torch.stack(out[::-1])


def build():
    torch.manual_seed(0)
    m = AC()

    def loss_fn(m, s, a, r, done, legal):
        logits, v = m(s)
        logits = logits.masked_fill(~legal, -torch.inf)
        logp = logits.log_softmax(-1)
        p = logp.exp()
        ent = -torch.where(legal, p * logp.masked_fill(~legal, 0), 0).sum(-1)
        with torch.no_grad():
            adv = gae(r, v, done)
            ret = adv + v
            m.scale.update(r)
            adv = m.scale(adv)
            ev = 1 - (ret - v).var() / r.var()
            m.last_ev = ev
        pg = -(logp.gather(-1, a[..., None]).squeeze(-1) * adv).mean()
        return pg + 0.5 * F.smooth_l1_loss(v, ret) - 0.01 * ent.mean()

    return m, batch_at(0), loss_fn


def batch_at(step):
    g = torch.Generator().manual_seed(step)
    s = torch.randn(6, 5, 4, generator=g)
    a = torch.randint(0, 2, (6, 5), generator=g)
    r = torch.randn(6, 5, generator=g) if step < 2 else torch.full((6, 5), -1.0)
    legal = torch.ones(6, 5, 3, dtype=torch.bool)
    legal[..., 2] = False
    return s, a, r, torch.zeros(6, 5), legal


def make_optimizer(model):
    return torch.optim.Adam(model.parameters(), 1e-3)
