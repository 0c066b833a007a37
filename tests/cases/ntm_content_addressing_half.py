"""Content addressing of a memory-augmented network in half precision: the eps=1e-8 of
cosine_similarity is 0 in fp16, and a memory slot that was never written is 0/0."""

import torch
import torch.nn.functional as F
from torch import nn

FIX = False
LOW = torch.float16
CASE = dict(
    id="ntm_content_addressing_half",
    source="",
    phase="forward",
    op="aten::div",
    node=None,
    marker="CULPRIT",
    cause="eps_underflow_low_precision",
    precision="fp16",
    also=["aten::cosine_similarity"],
    decoys=["aten::_softmax", "aten::mul", "aten::sum", "aten::bmm"],
    fix="eps=1e-3 in half precision",
)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.controller = nn.LSTMCell(3, 5)
        self.key = nn.Linear(5, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, x, memory):
        h, _ = self.controller(x)
        key = torch.tanh(self.key(h))
        eps = 1e-3 if FIX else 1e-8
        score = F.cosine_similarity(key[:, None], memory, dim=-1, eps=eps)  # CULPRIT
        weight = torch.softmax(4 * score, -1)
        return self.out(torch.bmm(weight[:, None], memory).squeeze(1))


def build():
    torch.manual_seed(0)
    memory = torch.randn(2, 5, 4)
    memory[1, 3:] = 0  # slots that were never written
    batch = (torch.randn(2, 3).to(LOW), memory.to(LOW), torch.tensor([0, 1]))
    return Reader().to(LOW), batch, lambda m, x, w, y: F.cross_entropy(m(x, w).float(), y)
