"""Multi-task transformer that balances its tasks by normalising gradients in tensor hooks.

The hook divides each token's gradient by its norm.  Tokens that no task looks at have an exactly
zero gradient: 0/0 inside the hook, in the backward of a finite loss.  Earlier in the backward, a
prompt that is no parameter receives NaN from a root of its own.
"""

import torch
from torch import nn
from torch.nn import functional as F

FIX = False
CASE = dict(
    id="large_gradnorm_tensor_hook",
    source="",
    phase="backward",
    op="aten::div",
    node=None,
    marker="CULPRIT",
    cause="zero_denominator_in_backward",
    precision="any",
    kinds=[7, 1, 10],
    in_hook=True,
    decoys=["aten::sqrt", "SqrtBackward0", "aten::mul", "aten::mm", "aten::addmm"],
    fix="clamp the norm",
)


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x):
        q, k, v = self.qkv(self.n1(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        return x + self.mlp(self.n2(x))


def balance(g):
    norm = g.square().sum(-1, keepdim=True).sqrt()
    if FIX:
        norm = norm.clamp(min=1e-12)
    return g / norm  # CULPRIT


class Trunk(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.stem = nn.Linear(4, d)
        self.blocks = nn.ModuleList(Block(d) for _ in range(3))

    def forward(self, x, prompt):
        x = self.stem(x) + prompt
        for block in self.blocks:
            x = block(x)
        if x.requires_grad:
            x.register_hook(balance)
        return x


class Tasks(nn.Module):
    def __init__(self, d=16):
        super().__init__()
        self.trunk = Trunk(d)
        self.depth, self.label = nn.Linear(d, 1), nn.Linear(d, 3)

    def forward(self, x, prompt):
        h = self.trunk(x, prompt)
        return {"depth": self.depth(h[:, :2]), "label": self.label(h[:, 2:5])}


def loss_fn(model, x, depth, label):
    prompt = torch.zeros(16, requires_grad=True)
    out = model(x, prompt)
    loss = F.l1_loss(out["depth"], depth)
    loss = loss + F.cross_entropy(out["label"].flatten(0, 1), label.flatten())
    with torch.no_grad():
        counts = torch.bincount(label.flatten(), minlength=4)
        right = torch.zeros(4).index_add_(0, label.flatten(), torch.ones(label.numel()))
        model.log = (right / counts).mean()  # NaN for the class that does not exist
    return loss + 1e-3 * prompt.square().sum().sqrt()


def build():
    torch.manual_seed(0)
    label = torch.randint(0, 3, (2, 3))
    return Tasks(), (torch.randn(2, 7, 4), torch.randn(2, 2, 1), label), loss_fn


def make_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)
