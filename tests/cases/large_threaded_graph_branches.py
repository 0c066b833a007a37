"""Graph network whose two edge types are processed in two Python threads.

A node without neighbours of the second type has degree zero, so the mean in that thread is 0/0 and
reaches the loss.  The first thread and the main one make NaN as well, for nodes that are left out.
"""

import threading

import torch
from torch import nn
from torch.nn import functional as F

FIX = False
CASE = dict(
    id="large_threaded_graph_branches",
    source="",
    phase="forward",
    op="aten::div",
    node=None,
    marker="CULPRIT",
    cause="zero_denominator_forward",
    precision="any",
    kinds=[11, 1],
    module="branches.1.convs.0",
    decoys=["aten::index_select", "aten::mm", "aten::cat", "aten::mean"],
    fix="clamp the degree",
)


class Conv(nn.Module):
    def __init__(self, d, guarded):
        super().__init__()
        self.own, self.other, self.norm = nn.Linear(d, d), nn.Linear(d, d), nn.LayerNorm(d)
        self.guarded = guarded

    def forward(self, x, edges):
        source, sink = edges
        total = torch.zeros_like(x).index_add(0, sink, x[source])
        degree = torch.bincount(sink, minlength=len(x)).unsqueeze(1).float()
        if self.guarded or FIX:
            degree = degree.clamp(min=1)
        mean = total / degree  # CULPRIT
        return x + F.gelu(self.norm(self.own(x) + self.other(mean)))


class Branch(nn.Module):
    def __init__(self, d, guarded):
        super().__init__()
        self.stem = nn.Linear(4, d)
        self.convs = nn.ModuleList(Conv(d, guarded) for _ in range(3))

    def forward(self, x, edges, weight):
        with torch.no_grad():  # a share of nothing, left out below
            share = weight / weight.sum(-1, keepdim=True)
            share = torch.where(weight > 0, share, torch.zeros(()))
        x = self.stem(x) + share.sum(-1, keepdim=True)
        for conv in self.convs:
            x = conv(x, edges)
        return x


class Hetero(nn.Module):
    def __init__(self, d=12):
        super().__init__()
        self.branches = nn.ModuleList([Branch(d, guarded=True), Branch(d, guarded=False)])
        self.mix = nn.Sequential(nn.Linear(2 * d, d), nn.GELU(), nn.Linear(d, 3))

    def forward(self, x, kinds, weight):
        out = [None, None]

        def work(i):
            out[i] = self.branches[i](x, kinds[i], weight)

        for i in range(2):  # one after the other, so that the order is the same in every run
            thread = threading.Thread(target=work, args=(i,), name=f"branch-{i}")
            thread.start()
            thread.join()
        return self.mix(torch.cat(out, -1))


def loss_fn(model, x, first, second, weight, label):
    with torch.no_grad():
        prior = label.bincount(minlength=4) / (label.bincount(minlength=4) - 2).clamp(min=0)
        model.log = prior.log().mean()
    logits = model(x, (first, second), weight)
    smooth = (logits[first[0]] - logits[first[1]]).square().mean()
    return F.cross_entropy(logits, label) + 1e-2 * smooth


def build():
    torch.manual_seed(0)
    source, sink = torch.arange(8), (torch.arange(8) + 1) % 8
    first = torch.stack([torch.cat([source, sink]), torch.cat([sink, source])])
    second = torch.stack([source, sink])[:, torch.arange(8) != 4]  # node 5 has no such neighbour
    weight = torch.rand(8, 3)
    weight[2] = 0
    return Hetero(), (torch.randn(8, 4), first, second, weight, torch.randint(0, 3, (8,))), loss_fn


def make_optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)
