"""A language model with windows of different width: only in the middle block a row of the attention
holds nothing but padding.  A statistic that is printed is infinite in every block."""

import math

import torch
import torch.nn.functional as F
from torch import nn

FIX = False
CASE = dict(
    id="large_window_padding_lm",
    source="",
    phase="forward",
    op="aten::_softmax",
    node=None,
    marker="CULPRIT",
    cause="fully_masked_reduction",
    precision="any",
    decoys=["aten::bmm", "aten::native_layer_norm"],
    fix="rows without an entry attend to themselves",
    occurrence=2,
    module="blocks.1.attn",
)


class Norm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.w = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.w


class Attn(nn.Module):
    def __init__(self, d, heads, window):
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv, self.o = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x, pad):
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        i = torch.arange(t)
        far = (i[:, None] - i[None]) >= self.window
        future = i[:, None] < i[None]
        bias = torch.zeros(t, t).masked_fill(far | future, -torch.inf)
        keep = torch.zeros(b, 1, 1, t).masked_fill(pad[:, None, None], -torch.inf)
        s = q @ k.mT / math.sqrt(q.shape[-1]) + bias + keep
        s = s.masked_fill(s.isneginf().all(-1, True), 0.0) if FIX else s
        w = s.softmax(-1)  # CULPRIT
        w = F.dropout(w, 0.1, self.training)
        return self.o((w @ v).transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    def __init__(self, d, window):
        super().__init__()
        self.n1, self.n2 = Norm(d), Norm(d)
        self.attn = Attn(d, 4, window)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(d, d)

    def forward(self, x, pad):
        x = x + self.attn(self.n1(x), pad)
        a, g = self.up(self.n2(x)).chunk(2, -1)
        return x + self.down(a * F.silu(g))


class LM(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList([Block(16, 16), Block(16, 3), Block(16, 16)])
        self.norm = Norm(16)
        self.head = nn.Linear(16, 20, bias=False)
        self.stats = {}

    def forward(self, tok, pad):
        x = self.emb(tok)
        for n, blk in enumerate(self.blocks):
            x = blk(x, pad)
            with torch.no_grad():
                self.stats[n] = (x.std() / (x.mean() - x.mean())).log()
        return self.head(self.norm(x))


def build():
    torch.manual_seed(0)
    tok = torch.randint(1, 20, (2, 8))
    pad = torch.zeros(2, 8, dtype=torch.bool)
    pad[1, 5:] = True

    def loss_fn(m, tok, pad):
        lo = m(tok, pad)
        t = tok.roll(-1, 1).masked_fill(pad, -100)
        return F.cross_entropy(lo.transpose(1, 2)[~pad.all(1)], t)

    pad[1, 2:5] = True
    return LM(), (tok, pad), loss_fn
