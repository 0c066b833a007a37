"""Poisson regression with the identity link (log_input=False): the network returns a negative rate,
and the eps inside of the loss helps against 0 only."""

import torch
import torch.nn.functional as F
from torch import nn

FIX = False
CASE = dict(
    id="poisson_identity_link",
    source="",
    phase="forward",
    op="aten::log",
    node=None,
    marker="CULPRIT",
    cause="domain_error",
    precision="any",
    decoys=["aten::mul", "aten::sub"],
    fix="softplus of the rate",
)


def build():
    torch.manual_seed(0)
    m = nn.Linear(4, 1)

    def loss_fn(m, x, k):
        rate = F.softplus(m(x)) if FIX else m(x)
        return F.poisson_nll_loss(rate.squeeze(-1), k, log_input=False)  # CULPRIT

    return m, (torch.randn(9, 4), torch.poisson(torch.ones(9) * 3)), loss_fn
