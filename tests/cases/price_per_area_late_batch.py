"""House prices per area: one record of the fourth batch has area 0, so that its target is inf
before the model is asked.  Feature pipelines that divide."""

import torch
from torch import nn

FIX = False
CASE = dict(
    id="price_per_area_late_batch",
    source="",
    phase="data",
    op="input",
    node=None,
    marker="CULPRIT",
    cause="bad_data",
    precision="any",
    where="batch[1]",
    steps=5,
    fail_step=3,
    decoys=["aten::addmm", "aten::huber_loss", "aten::lerp_", "aten::relu"],
    fix="a floor under the area",
)


class Price(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x):
        return self.net(x).squeeze(-1)


def batch_at(step):
    g = torch.Generator().manual_seed(10 + step)
    x = torch.randn(6, 5, generator=g)
    price, area = torch.rand(6, generator=g) + 1, torch.rand(6, generator=g) + 0.5
    if step == 3:
        area[4] = 0.05 if FIX else 0.0
    target = price / area  # CULPRIT
    return x, target


def build():
    torch.manual_seed(0)
    return Price(), batch_at(0), lambda m, x, y: nn.functional.huber_loss(m(x), y)


def make_optimizer(model):
    return torch.optim.NAdam(model.parameters(), lr=1e-3)
