"""Point transformer whose blocks are checkpointed, reentrant and not in turn.

Two points share a place after the third block pools them, and only that block's distances feel a
root of zero off the masked diagonal.  Its forward runs again inside the backward.  The recomputed
forwards also divide by zero for masked neighbours, which is selected away.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

FIX = False
CASE = dict(
    id="large_checkpoint_both_kinds",
    source="",
    phase="backward",
    op="aten::sqrt",
    node="SqrtBackward0",
    marker="CULPRIT",
    cause="infinite_derivative_at_boundary",
    precision="any",
    kinds=[9, 4, 1],
    module="blocks.2",
    occurrence=3,
    hook_blind=True,
    decoys=["aten::pow", "aten::where", "aten::div", "aten::reciprocal", "CheckpointFunction"],
    fix="eps inside the root",
)


class Block(nn.Module):
    def __init__(self, d, pool):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(d, d) for _ in range(3))
        self.move = nn.Linear(d, 3, bias=False)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.n1, self.n2, self.pool = nn.LayerNorm(d), nn.LayerNorm(d), pool

    def forward(self, x, place, live):
        h = self.n1(x)
        point = place + 0.1 * torch.tanh(self.move(h))
        if self.pool:  # the first two points become one
            point = torch.cat([point[:, :1], point[:, :1], point[:, 2:]], 1)
        d2 = (point.unsqueeze(2) - point.unsqueeze(1)).square().sum(-1)
        d2 = d2 + torch.eye(x.shape[1])  # no root of zero on the diagonal
        if FIX:
            d2 = d2 + 1e-8
        dist = d2.sqrt()  # CULPRIT
        fan = torch.where(live, 1 / live.sum(-1, keepdim=True), torch.zeros(()))
        weight = torch.softmax(self.q(h) @ self.k(h).transpose(1, 2) / 4 - dist, -1) * fan
        x = x + weight @ self.v(h)
        return x + self.mlp(self.n2(x))


class Cloud(nn.Module):
    def __init__(self, d=16):
        super().__init__()
        self.stem = nn.Linear(3, d)
        self.blocks = nn.ModuleList(Block(d, i == 2) for i in range(5))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 3)

    def forward(self, place, live):
        x = self.stem(place)
        for i, block in enumerate(self.blocks):
            x = checkpoint(block, x, place, live, use_reentrant=i % 2 == 0)
        return self.head(self.norm(x))


def loss_fn(model, place, live, flow):
    out = model(place, live)
    with torch.no_grad():
        error = (out - flow).norm(dim=-1) / (live.any(-1)).float()
        model.log = error.mean(), error.amax()
    edge = place.clone().requires_grad_()
    gap = (edge[:, 4] - edge[:, 4].detach()).square().sum(-1).sqrt()  # for this leaf alone
    return F.mse_loss(out, flow) + 1e-3 * gap.mean()


def build():
    torch.manual_seed(0)
    live = torch.ones(2, 6, 6, dtype=torch.bool)
    live[1, 5] = False
    return Cloud(), (torch.randn(2, 6, 3), live, torch.randn(2, 6, 3)), loss_fn


def make_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)
