"""Language model trained by an Adafactor that preconditions with the factors of the step before.

In step 1 one loss weight has a wrong unit: loss and gradients are about 1e21, which is finite, but
their square is not.  It goes into the factors of the state only; the update of step 1 used the old
ones and is normalised.  In step 2 the factors are divided by their mean: inf/inf in the parameters.
"""

import torch
from torch import nn
from torch.nn import functional as F

FIX = False
CASE = dict(
    id="large_factored_moment_overflow",
    source="",
    phase="optimizer",
    op="aten::pow",
    node=None,
    marker="CULPRIT",
    cause="overflow_fp32",
    precision="fp32",
    kinds=[3, 10],
    steps=4,
    fail_step=2,
    birth_step=1,
    also=["aten::square"],
    decoys=["aten::div", "aten::mean", "aten::rsqrt", "aten::sub_", "aten::lerp_"],
    fix="clip the gradient before it is squared",
)


class Factored(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad.reshape(len(p), -1), self.state[p], group["lr"])

    def update(self, p, g, state, lr):
        if not state:
            state["row"], state["col"] = torch.ones(len(g)), torch.ones(g.shape[1])
        scale = (state["row"] / state["row"].mean()).sqrt()[:, None] * state["col"].sqrt()
        step = g / (scale + 1e-8)
        p.sub_((lr * step / step.abs().amax().clamp(min=1e-30)).view_as(p))
        if FIX:
            g = g.clamp(-1e3, 1e3)
        square = g.square()  # CULPRIT
        state["row"].lerp_(square.mean(1), 0.1)
        state["col"].lerp_(square.mean(0), 0.1)


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x):
        q, k, v = self.qkv(self.n1(x)).chunk(3, -1)
        future = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        scores = (q @ k.transpose(1, 2) / 4).masked_fill(future, float("-inf"))
        x = x + self.out(scores.softmax(-1) @ v)
        return x + self.down(F.gelu(self.up(self.n2(x))))


class Lm(nn.Module):
    def __init__(self, vocab=11, d=16):
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        self.blocks = nn.ModuleList(Block(d) for _ in range(2))
        self.norm = nn.LayerNorm(d)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.embed.weight.T  # tied


def loss_fn(model, tokens, weight):
    logits = model(tokens[:, :-1])
    nll = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    with torch.no_grad():
        rare = torch.bincount(tokens.flatten(), minlength=11).float().reciprocal()  # inf: absent
        model.perplexity = (nll * rare[tokens[:, 1:].flatten()]).mean(), rare.mean()
    return (nll.view(2, -1).mean(1) * weight).mean()


def batch_at(step):
    g = torch.Generator().manual_seed(step)
    weight = torch.tensor([1.0, 1e21 if step == 1 else 0.5])
    return torch.randint(0, 9, (2, 8), generator=g), weight


def build():
    torch.manual_seed(0)
    return Lm(), batch_at(0), loss_fn


def make_optimizer(model):
    return Factored(model.parameters(), lr=1e-2)
