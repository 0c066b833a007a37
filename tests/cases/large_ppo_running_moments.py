"""PPO with observation moments that are updated after use; one batch keeps a single observation.

In step 1 only one observation is valid, so the unbiased variance is 0/0 and the running variance
becomes NaN, while the loss, the gradients and the parameters of that step stay finite.  Step 2
normalises with it.  Masked actions, empty episodes and logged values are non-finite all the time.
"""

import torch
from torch import nn
from torch.distributions import Categorical
from torch.nn import functional as F

FIX = False
CASE = dict(
    id="large_ppo_running_moments",
    source="",
    phase="forward",
    op="aten::div",
    node=None,
    marker="CULPRIT",
    cause="empty_reduction",
    precision="any",
    kinds=[3, 1],
    steps=4,
    fail_step=2,
    birth_step=1,
    module="moments",
    decoys=["aten::sub", "aten::rsqrt", "aten::addmm", "aten::lerp_", "aten::log"],
    fix="skip the update for fewer than two",
    where="buffer:moments.var",
)


class Moments(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("var", torch.ones(d))

    def forward(self, obs, valid):
        out = (obs - self.mean) * (self.var + 1e-6).rsqrt()
        kept = obs[valid]
        mean = kept.mean(0)
        n = max(len(kept), 2) if FIX else len(kept)
        var = (kept - mean).square().sum(0) / (n - 1)  # CULPRIT
        self.mean.lerp_(mean, 0.05)
        self.var.lerp_(var, 0.05)
        return out


class Trunk(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.first = nn.Linear(d, h)
        self.rest = nn.ModuleList(nn.Linear(h, h) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(h) for _ in range(4))

    def forward(self, x):
        x = torch.tanh(self.first(x))
        for layer, norm in zip(self.rest, self.norms, strict=True):
            x = x + torch.tanh(layer(norm(x)))
        return x


class Agent(nn.Module):
    def __init__(self, d=6, h=16, actions=4):
        super().__init__()
        self.moments = Moments(d)
        self.actor, self.critic = Trunk(d, h), Trunk(d, h)
        self.policy, self.value = nn.Linear(h, actions), nn.Linear(h, 1)

    def forward(self, obs, valid, legal):
        x = self.moments(obs, valid)
        logits = self.policy(self.actor(x))
        return logits.masked_fill(~legal, -1e9), self.value(self.critic(x)).squeeze(-1)


def loss_fn(agent, obs, valid, legal, action, old, reward, done):
    logits, value = agent(obs, valid, legal)
    pi = Categorical(logits=logits, validate_args=False)
    advantage, last = [], torch.zeros(())
    for t in reversed(range(len(reward))):  # generalised advantage estimation
        after = value[t + 1].detach() * (1 - done[t]) if t + 1 < len(reward) else 0.0
        last = reward[t] + 0.99 * after - value[t].detach() + 0.95 * 0.99 * (1 - done[t]) * last
        advantage.insert(0, last)
    advantage = torch.stack(advantage)
    returns = advantage + value.detach()
    with torch.no_grad():
        length = valid.float() / done  # inf within an episode, used nowhere
        weights = torch.where(done.bool(), length, torch.ones_like(done))
        agent.log = {"odds": (1 / pi.probs).log().mean(), "length": length.mean()}
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8) * weights
    ratio = (pi.log_prob(action) - old).exp()
    clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return F.mse_loss(value, returns) - clipped.mean() - 0.01 * pi.entropy().mean()


def batch_at(step):
    g = torch.Generator().manual_seed(step)
    valid = torch.ones(8, dtype=torch.bool)
    if step == 1:
        valid[1:] = False  # the environments were being reset
    legal = torch.ones(8, 4, dtype=torch.bool)
    legal[:, 3] = False
    done = torch.zeros(8)
    done[4] = 1
    obs, action = torch.randn(8, 6, generator=g), torch.randint(0, 3, (8,), generator=g)
    return obs, valid, legal, action, torch.full((8,), -1.1), torch.randn(8, generator=g), done


def build():
    torch.manual_seed(0)
    return Agent(), batch_at(0), loss_fn


def make_optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=3e-4)
