"""Set transformer built from nn.MultiheadAttention; one set is nothing but padding.

The softmax inside the module turns the fully masked row into NaN, and the pooled set is kept in the
loss.  Its frozen twin meets rows like that too, in the same module class, and they are sliced off;
the second of three layers alone uses a mask in the trained path.
"""

import torch
from torch import nn
from torch.nn import functional as F

FIX = False
CASE = dict(
    id="large_mha_padded_sample",
    source="",
    phase="forward",
    op="aten::_softmax",
    node=None,
    marker="CULPRIT",
    cause="fully_masked_reduction",
    precision="any",
    kinds=[12, 13, 4, 1],
    also=["aten::scaled_dot_product_attention", "aten::_safe_softmax"],
    occurrence=4,
    module="layers.1.attn",
    decoys=["aten::baddbmm", "aten::bmm", "aten::mean", "aten::addmm", "aten::masked_fill"],
    fix="let an empty set see one key",
)


class Layer(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.attn = nn.MultiheadAttention(d, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x, pad):
        if FIX and pad is not None:
            pad = pad & ~pad.all(1, keepdim=True)
        h = self.n1(x)
        y, weight = self.attn(h, h, h, key_padding_mask=pad)  # CULPRIT
        return x + y + self.mlp(self.n2(x)), weight


class Sets(nn.Module):
    def __init__(self, d=16):
        super().__init__()
        self.twin = nn.ModuleList(Layer(d) for _ in range(2)).requires_grad_(False)
        self.stem, self.layers = nn.Linear(4, d), nn.ModuleList(Layer(d) for _ in range(3))
        self.seed, self.head = nn.Parameter(torch.randn(1, 1, d)), nn.Linear(d, 2)

    def forward(self, x, pad):
        x = self.stem(x)
        with torch.no_grad():
            h = x
            for layer in self.twin:
                h, _ = layer(h, pad)
            full = ~pad.any(1)
            wanted = torch.zeros(len(x), x.shape[-1]).masked_scatter(full[:, None], h[full].mean(1))
        x = torch.cat([self.seed.expand(len(x), 1, -1), x], 1)
        maps = []
        for i, layer in enumerate(self.layers):
            mask = torch.cat([pad.all(1, keepdim=True), pad], 1) if i == 1 else None
            x, weight = layer(x, mask)
            maps.append(weight)
        return self.head(x[:, 0]), F.mse_loss(x[full].mean(1), wanted[full]), maps


def loss_fn(model, x, pad, y):
    logits, hint, maps = model(x, pad)
    with torch.no_grad():
        entropy = [-(w * w.log()).sum(-1).mean() for w in maps]
        model.log = entropy, x.sum((1, 2)) / (~pad).sum(1)
    return F.cross_entropy(logits, y) + 1e-2 * hint


def build():
    torch.manual_seed(0)
    pad = torch.zeros(4, 5, dtype=torch.bool)
    pad[1, 3:], pad[2] = True, True
    return Sets(), (torch.randn(4, 5, 4), pad, torch.tensor([0, 1, 1, 0])), loss_fn


def make_optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)
