"""Panoptic head with two faults in one forward: both terms of the loss are non-finite.

The dice score of a class that is in neither the prediction nor the target is 0/0; the log of a
probability that underflowed is -inf.  Mending one leaves the other.  Before both, a frozen prior
divides by zero at places that are selected away.
"""

import torch
from torch import nn
from torch.nn import functional as F

FIX = False  # True, "first" or "second"
CASE = dict(
    id="large_panoptic_two_terms",
    source="",
    phase="forward",
    op="aten::div",
    node=None,
    marker="CULPRIT",
    cause="zero_denominator_forward",
    precision="any",
    kinds=[2, 1],
    culprits=[
        dict(op="aten::div", node=None, marker="CULPRIT", cause="zero_denominator_forward"),
        dict(op="aten::log", node=None, marker="CULPRIT2", cause="underflow_to_zero"),
    ],
    decoys=["aten::add", "aten::mean", "aten::mul", "aten::_softmax"],
    fix="eps; log_softmax",
)


class Mixer(nn.Module):
    def __init__(self, n, d):
        super().__init__()
        self.tokens, self.channels = nn.Linear(n, n), nn.Linear(d, 2 * d)
        self.back, self.n1, self.n2 = nn.Linear(2 * d, d), nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x):
        x = x + self.tokens(self.n1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.back(F.gelu(self.channels(self.n2(x))))


class Panoptic(nn.Module):
    def __init__(self, n=16, d=12, classes=4):
        super().__init__()
        self.stem = nn.Linear(5, d)
        self.blocks = nn.ModuleList(Mixer(n, d) for _ in range(6))
        self.mask, self.cls = nn.Linear(d, classes), nn.Linear(d, classes)
        self.register_buffer("prior", torch.tensor([3.0, 0.0, 2.0, 0.0]))
        self.register_buffer("seen", torch.tensor([1.0, 1.0, 1.0, 0.0]))  # not the last class

    def forward(self, x):
        odds = self.prior / (self.prior * 0)
        keep = torch.where(self.prior < 0, odds, torch.ones(4))
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        mask = torch.relu(self.mask(x)) * keep * self.seen
        return mask, self.cls(x)


def dice(mask, onehot):
    num = 2 * (mask * onehot).sum((0, 1))
    den = mask.sum((0, 1)) + onehot.sum((0, 1))
    if FIX in (True, "first"):
        den = den + 1e-6
    return 1 - (num / den).mean()  # CULPRIT


def likelihood(logits, target):
    sharp = logits / 1e-3  # a temperature that was annealed too far
    if FIX in (True, "second"):
        log = sharp.log_softmax(-1)
    else:
        log = sharp.softmax(-1).log()  # CULPRIT2
    return -log.gather(-1, target.unsqueeze(-1)).mean()


def loss_fn(model, x, target):
    mask, logits = model(x)
    onehot = F.one_hot(target, 4).float()
    with torch.no_grad():
        miss = onehot.sum((0, 1)).log()  # -inf for the absent class, only logged
        model.log = miss - miss
    return dice(mask, onehot) + 1e-3 * likelihood(logits, target) + 0.1 * mask.square().mean()


def build():
    torch.manual_seed(0)
    return Panoptic(), (torch.randn(2, 16, 5), torch.randint(0, 3, (2, 16))), loss_fn


def make_optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)
