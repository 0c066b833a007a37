"""One root-mean-square norm is called three times; the second call meets a zero row.

The first call is sound.  The third runs on a probe, a leaf that is no parameter, and the backward
comes there first: NaN for the probe alone.  The second call normalises a bias-free projection of a
zero token, and its NaN reaches the weights.
"""

import torch
from torch import nn
from torch.nn import functional as F

FIX = False
CASE = dict(
    id="large_shared_rms_three_calls",
    source="",
    phase="backward",
    op="aten::sqrt",
    node="SqrtBackward0",
    marker="CULPRIT",
    cause="infinite_derivative_at_boundary",
    precision="any",
    kinds=[4, 1],
    occurrence=2,
    module="norm",
    decoys=["aten::div", "aten::pow", "aten::mul", "aten::mm", "aten::log"],
    fix="eps inside the root",
)


class Rms(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(d))

    def forward(self, x):
        power = x.square().mean(-1, keepdim=True)
        if FIX:
            power = power + 1e-6
        return self.gain * x / (power.sqrt() + 1e-3)  # CULPRIT


class Mixer(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(d, d) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x):
        h = self.n1(x)
        a = (self.q(h) @ self.k(h).transpose(1, 2) / 4).softmax(-1)
        x = x + a @ self.v(h)
        return x + self.mlp(self.n2(x))


class Contrast(nn.Module):
    """Two towers and a probe for how sensitive the embedding is."""

    def __init__(self, d=16):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(8, d), Mixer(d), Mixer(d))
        self.text = nn.Sequential(nn.Linear(8, d, bias=False))
        self.after, self.norm = nn.Sequential(Mixer(d), Mixer(d)), Rms(d)

    def forward(self, image, text, probe):
        a = self.norm(self.image(image)).mean(1)
        b = self.after(self.norm(self.text(text))).mean(1)
        return F.normalize(a, dim=-1), F.normalize(b, dim=-1), self.norm(probe)


def loss_fn(model, image, text):
    probe = torch.zeros(2, 16, requires_grad=True)
    a, b, touched = model(image, text, probe)
    logits = a @ b.T / 0.1
    label = torch.arange(len(a))
    loss = F.cross_entropy(logits, label) + F.cross_entropy(logits.T, label)
    with torch.no_grad():
        share = text.abs() / text.abs().sum(-1, keepdim=True)  # NaN for the empty token
        model.entropy = -(share * share.log()).sum(-1).mean()
    return loss + 1e-3 * touched.square().sum() + 1e-2 * touched.sum()


def build():
    torch.manual_seed(0)
    text = torch.randn(4, 5, 8)
    text[1, 4] = 0  # the empty token
    return Contrast(), (torch.randn(4, 5, 8), text), loss_fn


def make_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)
