"""Symmetric normalisation of a learned graph: deg ** -0.5 is inf for a node whose only edge was
pruned; it is filled with 0 as graph libraries do, but the backward of the power is 0 * inf."""

import torch
from torch import nn

FIX = False
CASE = dict(
    id="gcn_degree_masked_fill",
    source="",
    phase="backward",
    op="aten::pow",
    node="PowBackward0",
    marker="CULPRIT",
    cause="masked_branch_backward",
    precision="any",
    decoys=["aten::masked_fill_", "aten::index_add", "aten::_sparse_addmm", "aten::mul"],
    fix="clamp the degree before the power",
)


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.strength = nn.Parameter(torch.tensor([0.8, 0.5, 0.0, -1.2]))  # one edge is pruned
        self.lin = nn.Linear(3, 2)

    def forward(self, x, src, dst):
        w = self.strength.abs()
        deg = torch.zeros(len(x)).index_add(0, dst, w)
        if FIX:
            deg = deg.clamp(min=1e-6)
        inv = deg.pow(-0.5)  # CULPRIT
        inv = inv.masked_fill_(inv == float("inf"), 0.0)
        norm = inv[src] * w * inv[dst]
        adj = torch.sparse_coo_tensor(
            torch.stack([dst, src]), norm, (len(x), len(x)), check_invariants=True
        )
        return torch.sparse.mm(adj, self.lin(x))


def build():
    torch.manual_seed(0)
    src, dst = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 0, 3, 2])
    batch = (torch.randn(4, 3), src, dst, torch.tensor([0, 1, 1, 0]))
    return Graph(), batch, lambda m, x, s, d, y: nn.functional.cross_entropy(m(x, s, d), y)
