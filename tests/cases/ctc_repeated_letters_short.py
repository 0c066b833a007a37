"""Handwriting recognition with CTC: the word 'bee' needs four frames because of its double letter,
the line was cut to three, so no alignment exists and the loss is inf."""

import torch
import torch.nn.functional as F
from torch import nn

FIX = False
CASE = dict(
    id="ctc_repeated_letters_short",
    source="",
    phase="forward",
    op="aten::_ctc_loss",
    node=None,
    marker="CULPRIT",
    cause="infeasible_target",
    precision="any",
    also=["aten::ctc_loss"],
    decoys=["aten::_log_softmax", "aten::div", "aten::mean"],
    fix="zero_infinity=True, and filter such lines",
)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.columns = nn.GRU(4, 6, bidirectional=True)
        self.letters = nn.Linear(12, 7)

    def forward(self, strip):
        return self.letters(self.columns(strip)[0]).log_softmax(-1)


def loss_fn(m, strip, width, word, length):
    return F.ctc_loss(m(strip), word, width, length, zero_infinity=FIX)  # CULPRIT


def build():
    torch.manual_seed(0)
    word = torch.tensor([[1, 3, 2], [2, 5, 5]])
    batch = (torch.randn(6, 2, 4), torch.tensor([6, 3]), word, torch.tensor([3, 3]))
    return Reader(), batch, loss_fn
