"""Healthy: a soft actor-critic with compiled parts, two optimizers and targets of -inf.

Illegal actions have value -inf, and the maximum over them is finite; the squashed log-probability
divides by zero at the edge and is clamped as data; the reward of unfinished episodes is NaN and
indexed away; the temperature's log is logged at zero.
"""

import torch
from torch import nn
from torch.nn import functional as F

CASE = dict(
    id="large_control_compiled_rl",
    source="",
    phase="none",
    op=None,
    node=None,
    marker="CULPRIT",
    cause="healthy",
    precision="any",
    kinds=[8, 10, 13],
    steps=3,
    decoys=["aten::div", "aten::log", "aten::sub", "aten::mean", "aten::masked_fill"],
    fix="",
)


class Q(nn.Module):
    def __init__(self, d, actions, h=16):
        super().__init__()
        self.first, self.last = nn.Linear(d, h), nn.Linear(h, actions)
        self.mid = nn.ModuleList(nn.Linear(h, h) for _ in range(3))
        self.norm = nn.ModuleList(nn.LayerNorm(h) for _ in range(3))

    def forward(self, x):
        h = F.silu(self.first(x))
        for layer, norm in zip(self.mid, self.norm, strict=True):
            h = h + F.silu(layer(norm(h)))
        return self.last(h)


class Agent(nn.Module):
    def __init__(self, d=5, actions=4):
        super().__init__()
        self.a, self.b, self.pi = Q(d, actions), Q(d, actions), Q(d, actions)
        self.target = Q(d, actions).requires_grad_(False)
        self.alpha = nn.Parameter(torch.tensor(0.1))
        self.fast = torch.compile(self.pi.forward, backend="eager")

    @torch.no_grad()
    def follow(self):
        pairs = zip(self.target.parameters(), self.a.parameters(), strict=True)
        for slow, fast in pairs:
            slow.lerp_(fast, 0.05)


def loss_fn(agent, obs, after, action, reward, legal, edge):
    with torch.no_grad():
        best = agent.target(after).masked_fill(~legal, float("-inf")).amax(-1)
        known = torch.isfinite(reward)
        squash = 1 / (1 - edge.square())  # inf at the edge
        correction = squash.log().clamp(max=4.0)
        share = torch.where(legal, 1.0 / legal, torch.zeros(()))
        agent.log = reward.mean(), (best - best[0] / 0).mean(), agent.alpha.mul(0).log()
    wanted = reward[known] + 0.9 * best[known] + 0.01 * correction[known]
    critics = [q(obs).gather(-1, action)[known].squeeze(-1) for q in (agent.a, agent.b)]
    loss = sum(F.smooth_l1_loss(q, wanted) for q in critics)
    logits = agent.fast(obs).masked_fill(~legal, -1e9)
    log = logits.log_softmax(-1)
    both = torch.minimum(agent.a(obs), agent.b(obs)).detach()
    policy = (log.exp() * (agent.alpha.detach() * log * share - both)).sum(-1).mean()
    entropy = -(log.exp() * log).sum(-1).mean()
    return loss + policy + agent.alpha * (entropy.detach() - 0.5)


def batch_at(step):
    g = torch.Generator().manual_seed(step)
    reward = torch.randn(6, generator=g)
    reward[::3] = float("nan")
    legal = torch.rand(6, 4, generator=g) > 0.4
    legal[:, 0] = True
    obs, after = torch.randn(6, 5, generator=g), torch.randn(6, 5, generator=g)
    edge = torch.tensor([0.0, 1.0, -1.0, 0.5, 0.9, 1.0])
    return obs, after, torch.randint(0, 4, (6, 1), generator=g), reward, legal, edge


def build():
    torch.manual_seed(0)
    return Agent(), batch_at(0), loss_fn


def make_optimizer(model):
    slow = [model.alpha]
    fast = [p for n, p in model.named_parameters() if p.requires_grad and n != "alpha"]
    return torch.optim.Adam([{"params": fast}, {"params": slow, "lr": 1e-4}], lr=1e-3)


def train_step(model, batch, loss_fn, opt, scaler, step):
    opt.zero_grad()
    loss = loss_fn(model, *batch)
    yield "loss", loss
    loss.backward()
    yield "grads", loss
    opt.step()
    model.follow()
    yield "step", loss
