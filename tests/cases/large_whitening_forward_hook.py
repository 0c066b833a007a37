"""Residual network whose blocks are whitened by a forward hook that a library attached.

The hook divides by the standard deviation over the batch.  The auxiliary head, which runs in the
middle and is not in the loss, has a constant output and becomes NaN.  So does one channel of the
third block, whose gain was pruned to zero; that one counts.
"""

import torch
from torch import nn
from torch.nn import functional as F

FIX = False
CASE = dict(
    id="large_whitening_forward_hook",
    source="",
    phase="forward",
    op="aten::div",
    node=None,
    marker="CULPRIT",
    cause="zero_denominator_forward",
    precision="any",
    kinds=[7, 4, 1],
    occurrence=4,
    module="blocks.2",
    decoys=["aten::convolution", "aten::relu", "aten::addmm"],
    fix="eps in the denominator",
    in_hook=True,
)


def whiten(module, args, out):
    dims = [i for i in range(out.dim()) if i != 1]
    out = out - out.mean(dims, keepdim=True)
    spread = out.std(dims, keepdim=True)
    if FIX:
        spread = spread + 1e-3
    return out / spread  # CULPRIT


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)
        self.norm, self.squeeze = nn.GroupNorm(2, c), nn.Linear(c, c)
        self.gain = nn.Parameter(torch.ones(c, 1, 1))

    def forward(self, x):
        h = self.b(F.relu(self.norm(self.a(x))))
        h = h * torch.sigmoid(self.squeeze(h.mean((2, 3))))[:, :, None, None]
        return (x + h) * self.gain


class Net(nn.Module):
    def __init__(self, c=6):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, c, 3, padding=1), nn.Linear(c, 4)
        self.blocks = nn.ModuleList(Block(c) for _ in range(5))
        self.aux = nn.Linear(c, 4)
        nn.init.zeros_(self.aux.weight)
        with torch.no_grad():
            self.blocks[2].gain[3] = 0  # pruned
        for layer in (*self.blocks, self.aux):
            layer.register_forward_hook(whiten)

    def forward(self, x):
        x, aux = self.stem(x), None
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == 1:
                aux = self.aux(x.mean((2, 3)))
        return self.head(x.mean((2, 3))), aux


def loss_fn(model, x, y):
    logits, aux = model(x)
    with torch.no_grad():
        model.log = F.cross_entropy(aux, y), (logits - logits).log().mean()
    return F.cross_entropy(logits, y)


def build():
    torch.manual_seed(0)
    return Net(), (torch.randn(4, 3, 8, 8), torch.randint(0, 4, (4,))), loss_fn


def make_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=1e-2)
