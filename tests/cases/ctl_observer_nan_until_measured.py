"""Healthy: a buffer starts as NaN to say 'not measured yet' and is replaced on first use, as
observers for quantisation do; a second buffer stays NaN and is only read in evaluation."""

import torch
from torch import nn

CASE = dict(
    id="ctl_observer_nan_until_measured",
    source="",
    phase="none",
    op=None,
    node=None,
    marker="CULPRIT",
    cause="healthy",
    precision="any",
    decoys=["aten::isnan", "aten::where", "aten::lerp", "buffer:scale", "buffer:offset"],
    fix="",
    steps=3,
)


class Observer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(float("nan")))
        self.register_buffer("offset", torch.full((4,), float("nan")))

    def forward(self, x):
        if not self.training:
            return x / self.scale + self.offset
        with torch.no_grad():
            top = x.abs().amax()
            mixed = torch.lerp(self.scale, top, 0.1)
            self.scale.copy_(torch.where(torch.isnan(self.scale), top, mixed))
        return x / self.scale


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), Observer(), nn.Linear(4, 2))
    batch = (torch.randn(6, 3), torch.tensor([0, 1, 1, 0, 1, 0]))
    return model, batch, lambda m, x, y: nn.functional.cross_entropy(m(x), y)


def make_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
