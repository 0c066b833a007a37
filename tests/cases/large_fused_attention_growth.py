"""Decoder with fused attention on unnormalised, rectified queries; the fifth layer's scores overflow.

A misplaced gain makes the residual stream grow from layer to layer; queries and keys stay finite,
their product does not fit in float32, and the fused kernel returns NaN without an op in between.
A frozen retriever runs the same attention on padding and its NaN rows are sliced off.
"""

import torch
from torch import nn
from torch.nn import functional as F

FIX = False
CASE = dict(
    id="large_fused_attention_growth",
    source="",
    phase="forward",
    op="aten::_scaled_dot_product_flash_attention_for_cpu",
    node=None,
    also=[
        "aten::scaled_dot_product_attention",
        "aten::_scaled_dot_product_attention_math",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::bmm",
        "aten::_softmax",
    ],
    marker="CULPRIT",
    cause="overflow_fp32",
    precision="fp32",
    kinds=[12, 4, 1],
    occurrence=6,
    module="layers.4.attn",
    decoys=["aten::addmm", "aten::native_layer_norm"],
    fix="normalise queries and keys",
)


class Attention(nn.Module):
    def __init__(self, d, heads=2):
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(d, 3 * d), nn.Linear(d, d), heads

    def forward(self, x, causal):
        parts = self.qkv(x).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        q, k = F.relu(q), F.relu(k)  # of products of both signs a kernel may make inf - inf or 0
        if FIX:
            q, k = (t / t.abs().amax(-1, keepdim=True) for t in (q + 1e-6, k + 1e-6))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # CULPRIT
        y = y.transpose(1, 2).flatten(2)
        return self.out(y / y.abs().amax(-1, keepdim=True).clamp(min=1))


class Layer(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.attn, self.norm = Attention(d), nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x, causal=True):
        x = x + self.attn(x, causal)
        return x + 1e6 * self.down(F.gelu(self.up(x)))


class Decoder(nn.Module):
    def __init__(self, vocab=13, d=16):
        super().__init__()
        self.retriever = Layer(d).requires_grad_(False)
        self.embed, self.mem = nn.Embedding(vocab, d), nn.Embedding(vocab, d)
        self.layers = nn.ModuleList(Layer(d) for _ in range(5))
        self.norm = nn.LayerNorm(d)

    def forward(self, tokens, memory, lengths):
        with torch.no_grad():  # padding is stored as 1e30
            found = self.retriever.attn(memory, causal=True)
            found = torch.stack([m[: int(n)].mean(0) for m, n in zip(found, lengths, strict=True)])
        x = self.embed(tokens) + 0.1 * found.unsqueeze(1)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x / 1e20) @ self.embed.weight.T


def loss_fn(model, tokens, memory, lengths):
    logits = model(tokens[:, :-1], memory, lengths)
    with torch.no_grad():
        model.log = (memory.square().sum(-1) / lengths.sub(lengths).unsqueeze(1)).mean()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def build():
    torch.manual_seed(0)
    lengths = torch.tensor([6, 4])
    memory = torch.randn(2, 6, 16)
    memory[1, 4:] = 1e30
    return Decoder(), (torch.randint(0, 13, (2, 9)), memory, lengths), loss_fn


def make_optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)
