"""Healthy: the forward algorithm of a left-to-right HMM in log space; forbidden transitions and all
but one start state are log(0) = -inf, yet every state keeps a predecessor."""

import torch
from torch import nn

CASE = dict(
    id="ctl_hmm_log_zero_transitions",
    source="",
    phase="none",
    op=None,
    node=None,
    marker="CULPRIT",
    cause="healthy",
    precision="any",
    decoys=["aten::log", "aten::logsumexp", "aten::masked_fill", "aten::add"],
    fix="",
)


class Phones(nn.Module):
    def __init__(self):
        super().__init__()
        self.jump = nn.Parameter(0.1 * torch.randn(4, 4))
        self.emit = nn.Linear(3, 4)
        self.register_buffer("start", torch.tensor([1.0, 0.0, 0.0, 0.0]))

    def forward(self, x):
        allowed = torch.ones(4, 4).triu().bool()
        jump = self.jump.masked_fill(~allowed, float("-inf")).log_softmax(-1)
        emit = self.emit(x).log_softmax(-1)
        alpha = torch.log(self.start) + emit[0]
        for e in emit[1:]:
            alpha = torch.logsumexp(alpha[:, None] + jump, 0) + e
        return alpha.logsumexp(0)


def build():
    torch.manual_seed(0)
    return Phones(), (torch.randn(7, 3),), lambda m, x: -m(x)
