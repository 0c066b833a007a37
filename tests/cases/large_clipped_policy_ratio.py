"""Clipped policy gradient: one action was nearly impossible under the old policy, so that its ratio
overflows; the clipped one is smaller and is taken, and the backward of the other still runs."""

import torch
from torch import nn
from torch.nn import functional as F

FIX = False
CASE = dict(
    id="large_clipped_policy_ratio",
    source="",
    phase="backward",
    op="aten::exp",
    node="ExpBackward0",
    marker="CULPRIT",
    cause="masked_branch_backward",
    precision="fp32",
    decoys=["aten::minimum", "aten::mul", "aten::clamp", "aten::neg"],
    fix="clamp the logarithm of the ratio",
)


class ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh())
        self.policy, self.value = nn.Linear(24, 4), nn.Linear(24, 1)

    def forward(self, state):
        h = self.body(state)
        return self.policy(h).log_softmax(-1), self.value(h)[:, 0]


def loss_fn(model, state, action, old, advantage, returns):
    logs, value = model(state)
    change = logs.gather(1, action[:, None])[:, 0] - old
    if FIX:
        change = change.clamp(-20, 20)
    ratio = torch.exp(change)  # CULPRIT
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    entropy = -(logs.exp() * logs).sum(-1)
    with torch.no_grad():
        model.divergence = ((ratio - 1) - change).mean()
    return -surrogate.mean() + 0.5 * F.mse_loss(value, returns) - 0.01 * entropy.mean()


def build():
    torch.manual_seed(0)
    old, advantage = torch.full((12,), -1.4), torch.randn(12)
    old[5], advantage[5] = -120.0, 2.0
    batch = (torch.randn(12, 5), torch.randint(0, 4, (12,)), old, advantage, torch.randn(12))
    return ActorCritic(), batch, loss_fn
