"""Layout of a molecule with repulsion min(1/d, 100): two atoms at one place make 1/0 = inf, the cap
hides it, and the backward of the reciprocal is 0 * inf."""

import torch
from torch import nn

FIX = False
CASE = dict(
    id="capped_repulsion_same_place",
    source="",
    phase="backward",
    op="aten::reciprocal",
    node="ReciprocalBackward0",
    marker="CULPRIT",
    cause="masked_branch_backward",
    precision="any",
    decoys=["aten::minimum", "aten::abs", "aten::index", "aten::sum"],
    fix="cap the distance from below, before the reciprocal",
)


class Layout(nn.Module):
    def __init__(self):
        super().__init__()
        self.pos = nn.Parameter(torch.tensor([[0.0, 0.0], [1.0, 0.5], [0.3, -2.0], [1.0, 0.5]]))

    def forward(self, i, j):
        d = (self.pos[i] - self.pos[j]).abs().sum(-1)
        if FIX:
            d = d.clamp(min=0.01)
        push = d.reciprocal()  # CULPRIT
        return d, torch.minimum(push, torch.tensor(100.0))


def loss_fn(m, i, j, bond):
    d, push = m(i, j)
    return torch.where(bond, (d - 1).pow(2), push).sum()


def build():
    i, j = torch.triu_indices(4, 4, 1)
    return Layout(), (i, j, torch.tensor([True, False, False, True, False, True])), loss_fn
