"""Layer-wise trust ratio |w| / |g| by hand: the adapter behind a closed gate has a gradient of
exactly 0, the ratio is inf, and inf * 0 is written to the parameter."""

import torch
from torch import nn

FIX = False
CASE = dict(
    id="lars_trust_ratio_zero_gradient",
    source="",
    phase="optimizer",
    op="aten::div",
    node=None,
    marker="CULPRIT",
    cause="optimizer_arithmetic",
    precision="any",
    also=["aten::mul"],
    decoys=["aten::linalg_vector_norm", "aten::sub_", "aten::addmm", "aten::tanh"],
    fix="|g| + 1e-9",
)


class Lars(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                size = p.grad.norm()
                if FIX:
                    size = size + 1e-9
                ratio = p.norm() / size  # CULPRIT
                p.sub_(group["lr"] * ratio * p.grad)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.adapter, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("gate", torch.tensor(0.0))

    def forward(self, x):
        h = torch.tanh(self.base(x))
        return self.head(h + self.gate * self.adapter(h))


def build():
    torch.manual_seed(0)
    batch = (torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))
    return Net(), batch, lambda m, x, y: nn.functional.cross_entropy(m(x), y)


def make_optimizer(model):
    return Lars(model.parameters(), lr=1e-3)
