"""Healthy: F.kl_div from a teacher with probabilities of exactly 0 (it multiplies by xlogy), and a
Gaussian loss with a predicted variance of exactly 0 (it is clamped inside)."""

import torch
import torch.nn.functional as F
from torch import nn

CASE = dict(
    id="ctl_kl_and_gaussian_at_zero",
    source="",
    phase="none",
    op=None,
    node=None,
    marker="CULPRIT",
    cause="healthy",
    precision="any",
    decoys=["aten::xlogy", "aten::log", "aten::div", "aten::clamp_"],
    fix="",
)


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 5)
        self.word, self.mean, self.var = nn.Linear(5, 4), nn.Linear(5, 1), nn.Linear(5, 1)
        nn.init.constant_(self.var.bias, -9.0)

    def forward(self, x):
        h = torch.relu(self.body(x))
        return self.word(h).log_softmax(-1), self.mean(h), torch.relu(self.var(h))


def loss_fn(m, x, teacher, y):
    logq, mean, var = m(x)
    kl = F.kl_div(logq, teacher, reduction="batchmean")
    return kl + 1e-3 * F.gaussian_nll_loss(mean, y, var, eps=1e-3)


def build():
    torch.manual_seed(0)
    teacher = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.1, 0.2, 0.3, 0.4]])
    return Student(), (torch.randn(3, 3), teacher, torch.randn(3, 1)), loss_fn
