"""Atoms that the network moves: two of one kind at the same place keep a distance of 0, whose slope
is infinite.  The segment softmax is full of -inf that do no harm."""

import torch
import torch.nn.functional as F
from torch import nn

FIX = False
CASE = dict(
    id="large_molecules_coincident_atoms",
    source="",
    phase="backward",
    op="aten::pow",
    node="PowBackward0",
    marker="CULPRIT",
    cause="infinite_derivative_at_boundary",
    precision="any",
    decoys=["aten::div", "aten::mul"],
    fix="an eps under the root",
)


class Gat(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.w, self.a = nn.Linear(d, d), nn.Linear(2 * d + 1, 1)

    def forward(self, h, e, dist):
        src, dst = e
        z = self.w(h)
        s = F.leaky_relu(self.a(torch.cat([z[src], z[dst], dist[:, None]], -1)).squeeze(-1))
        top = torch.full((len(h),), -torch.inf).scatter_reduce(0, dst, s.detach(), "amax")
        w = (s - top[dst]).exp()
        tot = torch.zeros(len(h)).index_add(0, dst, w)
        w = w / tot[dst]
        return h + F.silu(torch.zeros_like(h).index_add(0, dst, w[:, None] * z[src]))


class Mol(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(5, 8)
        self.shift = nn.Embedding(5, 3)
        self.layers = nn.ModuleList(Gat(8) for _ in range(3))
        self.out = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 1))

    def forward(self, z, pos, e, batch):
        pos = pos + 0.1 * self.shift(z)
        d2 = (pos[e[0]] - pos[e[1]]).square().sum(-1)
        dist = (d2 + FIX * 1e-12) ** 0.5  # CULPRIT
        rbf = torch.exp(-dist)
        h = self.emb(z)
        for l in self.layers:
            h = l(h, e, rbf)
        n = int(batch.max()) + 1
        tot = torch.zeros(n, 1).index_add(0, batch, self.out(h))
        cnt = torch.zeros(n, 1).index_add(0, batch, torch.ones(len(h), 1))
        return (tot / cnt.clamp(min=1)).squeeze(-1)


def build():
    torch.manual_seed(0)
    z = torch.randint(0, 5, (9,))
    pos = torch.randn(9, 3)
    e = torch.tensor([[0, 1, 1, 2, 3, 4, 5, 6, 7, 7], [1, 0, 2, 1, 4, 3, 6, 5, 8, 7]])
    batch = torch.tensor([0, 0, 0, 1, 1, 2, 2, 4, 4])
    return (
        Mol(),
        (z, pos, e, batch, torch.randn(5)),
        lambda m, z, p, e, b, y: F.l1_loss(m(z, p, e, b), y),
    )
