"""The forward algorithm of a CRF with a log-sum-exp by hand: a tag that nothing may lead to has a
column of -inf, and its maximum is subtracted from it."""

import torch
from torch import nn

FIX = False
CASE = dict(
    id="crf_forbidden_tag_by_hand",
    source="",
    phase="forward",
    op="aten::sub",
    node=None,
    marker="CULPRIT",
    cause="fully_masked_reduction",
    precision="any",
    decoys=["aten::exp", "aten::add"],
    fix="a large finite number for -inf",
)


class Crf(nn.Module):
    def __init__(self):
        super().__init__()
        self.em = nn.Linear(4, 4)
        self.tr = nn.Parameter(torch.randn(4, 4))
        f = torch.zeros(4, 4)
        f[:, 3] = -torch.inf
        f[:, 0] = -torch.inf
        self.register_buffer("forbid", f)

    @staticmethod
    def lse(x):
        x = x.clamp(min=-1e4) if FIX else x
        m = x.amax(1)
        return m + (x - m[:, None]).exp().sum(1).log()  # CULPRIT

    def forward(self, x):
        e = self.em(x)
        t = self.tr + self.forbid
        alpha = e[:, 0]
        for i in range(1, x.shape[1]):
            alpha = self.lse(alpha[:, :, None] + t[None]) + e[:, i]
        return torch.logsumexp(alpha, 1) - e.sum((1, 2))


def build():
    torch.manual_seed(0)
    return Crf(), (torch.randn(2, 6, 4),), lambda m, x: m(x).mean()
