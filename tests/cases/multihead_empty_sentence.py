"""nn.MultiheadAttention with a key padding mask over a batch that holds an empty sentence: no key
is left, and the softmax of a row of -inf is NaN (its attention weights are asked for)."""

import torch
from torch import nn

FIX = False
CASE = dict(
    id="multihead_empty_sentence",
    source="",
    phase="forward",
    op="aten::_softmax",
    node=None,
    marker="CULPRIT",
    cause="fully_masked_reduction",
    precision="any",
    decoys=["aten::baddbmm", "aten::bmm", "aten::nll_loss_forward"],
    fix="always leave the first token visible",
)


class Sentiment(nn.Module):
    def __init__(self):
        super().__init__()
        self.word = nn.Embedding(9, 8, padding_idx=0)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 2)

    def forward(self, ids):
        x = self.word(ids)
        empty = ids == 0
        if FIX:
            empty[:, 0] = False
        y, weights = self.attn(x, x, x, key_padding_mask=empty)  # CULPRIT
        return self.out(y.mean(1)), weights


def build():
    torch.manual_seed(0)
    ids = torch.tensor([[3, 1, 4, 0], [0, 0, 0, 0], [5, 2, 0, 0]])
    batch = (ids, torch.tensor([1, 0, 1]))
    return Sentiment(), batch, lambda m, ids, y: nn.functional.cross_entropy(m(ids)[0], y)
