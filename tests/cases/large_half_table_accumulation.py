"""Language model with a tied half-precision table and four micro-batches that are not averaged.

The loss is scaled by hand; each micro-batch's gradient of the table fits into half precision, their
sum in .grad does not: the engine's own addition, in the third backward, overflows.  A
speaker vector that is no parameter gets NaN in every one of them before.
"""

import torch
from torch import nn
from torch.nn import functional as F

FIX = False
CASE = dict(
    id="large_half_table_accumulation",
    source="",
    phase="backward",
    op="aten::add_",
    node=None,
    marker="CULPRIT",
    cause="gradient_accumulation_overflow",
    precision="fp16",
    kinds=[10, 1],
    also=["aten::add", "AccumulateGrad"],
    engine_add=True,
    hook_blind=True,
    decoys=["aten::sqrt", "SqrtBackward0", "aten::_to_copy", "aten::mm", "aten::div_", "aten::mul"],
    fix="divide the loss by the number of micro-batches",
)
SCALE = 80000.0


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x):
        q, k, v = self.qkv(self.n1(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class Lm(nn.Module):
    def __init__(self, vocab=9, d=12):
        super().__init__()
        self.table = nn.Parameter((0.1 * torch.randn(vocab, d)).half())
        self.blocks = nn.ModuleList(Block(d) for _ in range(3))
        self.norm = nn.LayerNorm(d)

    def forward(self, tokens, speaker):
        table = self.table.float()
        x = table[tokens] + speaker
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ table.T


def micro_loss(model, tokens):
    speaker = torch.zeros(12, requires_grad=True)
    logits = model(tokens[:, :-1], speaker)
    with torch.no_grad():
        model.log = (logits / logits.mul(0)).mean()
    size = speaker.square().sum().sqrt()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + 1e-3 * size


def loss_fn(model, batch):
    return SCALE * sum(micro_loss(model, tokens) for tokens in batch)


def build():
    torch.manual_seed(0)
    return Lm(), (torch.randint(0, 9, (1, 2, 7)).repeat(4, 1, 1),), loss_fn


def make_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=1e-2)


def train_step(model, batch, loss_fn, opt, scaler, step):
    opt.zero_grad()
    for tokens in batch[0]:
        loss = micro_loss(model, tokens)
        yield "loss", loss
        scaled = loss * SCALE / (len(batch[0]) if FIX else 1)
        scaled.backward()  # CULPRIT
    yield "grads", loss
    with torch.no_grad():
        for p in model.parameters():
            p.grad.div_(SCALE)
    opt.step()
    yield "step", loss
