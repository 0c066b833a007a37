"""Distance to the origin of the Poincaré ball in bf16: the bound 1 - 1e-5 that keeps points inside
the ball rounds to exactly 1, and atanh(1) is infinite.  Hyperbolic embeddings in low precision."""

import torch
from torch import nn

FIX = False
LOW = torch.bfloat16
CASE = dict(
    id="poincare_ball_bound_bf16",
    source="",
    phase="forward",
    op="aten::atanh",
    node=None,
    marker="CULPRIT",
    cause="eps_underflow_low_precision",
    precision="bf16",
    decoys=["aten::clamp", "aten::linalg_vector_norm", "aten::mul", "aten::relu", "aten::sub"],
    fix="a bound that the dtype can hold, 1 - 2**-6",
)


class Taxonomy(nn.Module):
    def __init__(self):
        super().__init__()
        self.place = nn.Embedding(6, 2)
        self.place.weight.data.mul_(0.2)
        self.place.weight.data[4] = torch.tensor([0.9, 0.7])  # drifted out of the ball

    def depth(self, ids):
        v = self.place(ids)
        r = v.norm(dim=-1).clamp(max=1 - 2**-6 if FIX else 1 - 1e-5)
        return 2 * torch.atanh(r)  # CULPRIT


def loss_fn(m, child, parent):
    gap = m.depth(child) - m.depth(parent)
    return torch.relu(0.5 - gap.float()).mean()


def build():
    torch.manual_seed(0)
    return Taxonomy().to(LOW), (torch.tensor([1, 2, 5]), torch.tensor([0, 4, 3])), loss_fn
