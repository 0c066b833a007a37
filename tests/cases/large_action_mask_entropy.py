"""Actor-critic whose action mask of -inf becomes NaN far away, in the entropy bonus.

The mask is set in the policy head and survives log_softmax as the intended infinity.  The entropy
multiplies it by a probability of zero.  Before that the old policy's logged entropy does the same
without reaching the loss, and the divergence selects the masked actions away.
"""

import torch
from torch import nn
from torch.nn import functional as F

FIX = False
CASE = dict(
    id="large_action_mask_entropy",
    source="",
    phase="forward",
    op="aten::mul",
    node=None,
    marker="CULPRIT",
    cause="inf_minus_inf_or_zero_times_inf",
    precision="any",
    kinds=[13, 1],
    module="bonus",
    occurrence=2,
    decoys=["aten::masked_fill", "aten::_log_softmax", "aten::sub", "aten::sum", "aten::exp"],
    fix="fill masked log-probabilities with 0",
)


class Unit(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.unit, self.norm = nn.GRUCell(d, h), nn.LayerNorm(h)

    def forward(self, x):
        state, out = x.new_zeros(x.shape[1], self.norm.normalized_shape[0]), []
        for frame in x:
            state = self.unit(frame, state)
            out.append(self.norm(state))
        return torch.stack(out)


class Policy(nn.Module):
    def __init__(self, h, actions):
        super().__init__()
        self.out = nn.Linear(h, actions)

    def forward(self, h, legal):
        return self.out(h).masked_fill(~legal, float("-inf"))


class Bonus(nn.Module):
    """Entropy of a categorical distribution."""

    def forward(self, log):
        prob = log.exp()
        if FIX:
            log = log.masked_fill(prob == 0, 0.0)
        return -(prob * log).sum(-1)  # CULPRIT


class Agent(nn.Module):
    def __init__(self, d=5, h=12, actions=6):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(d, h), nn.Tanh(), nn.Linear(h, h))
        self.memory, self.policy, self.value = Unit(h, h), Policy(h, actions), nn.Linear(h, 1)
        self.bonus = Bonus()

    def forward(self, obs, legal):
        h = self.memory(self.encoder(obs))
        return self.policy(h, legal).log_softmax(-1), self.value(h).squeeze(-1)


def vtrace(value, reward, ratio, gamma=0.97):
    delta = ratio.clamp(max=1) * (reward[:-1] + gamma * value[1:] - value[:-1])
    out, carry = [], torch.zeros_like(value[0])
    for t in reversed(range(len(delta))):
        carry = delta[t] + gamma * ratio[t].clamp(max=1) * carry
        out.insert(0, carry)
    return torch.stack(out) + value[:-1]


def loss_fn(agent, obs, legal, action, old, reward):
    with torch.no_grad():
        old = old.masked_fill(~legal, float("-inf")).log_softmax(-1)
        agent.log = {"old": agent.bonus(old).mean(), "odds": (old - old).exp().mean()}
    log, value = agent(obs, legal)
    chosen = log.gather(-1, action.unsqueeze(-1)).squeeze(-1)
    ratio = (chosen - old.gather(-1, action.unsqueeze(-1)).squeeze(-1)).exp()
    target = vtrace(value.detach(), reward, ratio[:-1].detach())
    advantage = target - value[:-1].detach()
    zero = torch.zeros(())
    gap = torch.where(legal, old, zero) - torch.where(legal, log, zero)
    divergence = (torch.where(legal, old, zero).exp() * gap * legal).sum(-1).mean()
    policy = -(ratio[:-1] * advantage).mean() + 0.1 * divergence
    return policy + F.mse_loss(value[:-1], target) - 1e-2 * agent.bonus(log).mean()


def build():
    torch.manual_seed(0)
    legal = torch.rand(7, 3, 6) > 0.3
    legal[..., 0] = True
    action = torch.zeros(7, 3, dtype=torch.long)
    batch = (torch.randn(7, 3, 5), legal, action, torch.randn(7, 3, 6), torch.randn(7, 3))
    return Agent(), batch, loss_fn


def make_optimizer(model):
    return torch.optim.RMSprop(model.parameters(), lr=1e-3)
