"""A hook after the accumulation scales every row of an embedding's gradient to 1; the rows of words
that did not occur are 0."""

import torch
from torch import nn

FIX = False
CASE = dict(
    id="unit_rows_after_accumulation",
    source="",
    phase="backward",
    op="aten::div",
    node=None,
    marker="CULPRIT",
    cause="zero_denominator_in_backward",
    precision="any",
    decoys=["aten::mul"],
    fix="an eps",
)


def build():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 1))

    def unit(p):
        p.grad = p.grad / (p.grad.norm(dim=-1, keepdim=True) + FIX * 1e-8)  # CULPRIT

    m[0].weight.register_post_accumulate_grad_hook(unit)
    return m, (torch.tensor([0, 2, 4]),), lambda m, i: m(i).square().mean()
