"""Healthy: a mixture of experts in Python threads; some experts receive no token at all.

The mean load of an empty expert is 0/0 in its own thread, its top-k gate is softmaxed from a row
of -inf and multiplied by nothing; the balance is computed from counts as data; the dispatch buffer
is filled with NaN and overwritten wherever it is read.
"""

import threading

import torch
from torch import nn
from torch.nn import functional as F

CASE = dict(
    id="large_control_threaded_experts",
    source="",
    phase="none",
    op=None,
    node=None,
    marker="CULPRIT",
    cause="healthy",
    precision="any",
    kinds=[11, 1, 13],
    steps=3,
    decoys=["aten::mean", "aten::div", "aten::_softmax", "aten::full", "aten::log"],
    fix="",
)


class Expert(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.register_buffer("load", torch.zeros(d))

    def forward(self, x):
        with torch.no_grad():
            self.load.copy_(x.mean(0) / x.square().mean(0).sqrt())  # of no token
        return self.down(F.silu(self.up(self.norm(x))))


class Moe(nn.Module):
    def __init__(self, d, experts=4, threads=2):
        super().__init__()
        self.gate, self.threads = nn.Linear(d, experts), threads
        self.experts = nn.ModuleList(Expert(d) for _ in range(experts))

    def forward(self, x, allowed):
        logits = self.gate(x).masked_fill(~allowed, float("-inf"))
        weight, chosen = logits.softmax(-1).max(-1)
        parts = [None] * len(self.experts)

        def work(first):
            for i in range(first, len(self.experts), self.threads):
                parts[i] = self.experts[i](x[chosen == i])

        for first in range(self.threads):
            thread = threading.Thread(target=work, args=(first,))
            thread.start()
            thread.join()
        with torch.no_grad():
            rows = torch.full((2, len(parts)), float("-inf")).softmax(-1)
            self.log = rows.mean(), allowed.float().mean(0).log()
        out = torch.full_like(x, float("nan"))
        for i, part in enumerate(parts):
            out = out.index_put((torch.where(chosen == i)[0],), part)
        return x + weight.unsqueeze(-1) * out


class Net(nn.Module):
    def __init__(self, d=12, depth=3):
        super().__init__()
        self.embed, self.norm = nn.Embedding(9, d), nn.LayerNorm(d)
        self.attn = nn.ModuleList(nn.MultiheadAttention(d, 2) for _ in range(depth))
        self.moe = nn.ModuleList(Moe(d) for _ in range(depth))

    def forward(self, tokens, allowed):
        x = self.embed(tokens)
        for attn, moe in zip(self.attn, self.moe, strict=True):
            x = x + attn(x, x, x, need_weights=False)[0]
            x = moe(x, allowed)
        return self.norm(x) @ self.embed.weight.T


def loss_fn(model, tokens, allowed):
    logits = model(tokens, allowed)
    with torch.no_grad():
        count = tokens.bincount(minlength=12).float()
        model.log = (count / count.sum()).log().mean(), logits.sub(logits).log().mean()
    return F.cross_entropy(logits[:-1], tokens[1:])


def build():
    torch.manual_seed(0)
    allowed = torch.tensor([True, True, False, True])
    return Net(), (torch.randint(0, 9, (10,)), allowed), loss_fn


def make_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)
