"""Recurrent transcriber that turns each spectral frame into shares; one true frame is silent.

The shares are computed in every time step.  Padding frames are 0/0 as well, in steps 1, 2, 9 and
10 of 10, but the update is masked there.  The silent frame in step 7 is the only one that counts.
"""

import torch
from torch import nn
from torch.nn import functional as F

FIX = False
CASE = dict(
    id="large_unrolled_frame_share",
    source="",
    phase="forward",
    op="aten::div",
    node=None,
    marker="CULPRIT",
    cause="zero_denominator_forward",
    precision="any",
    kinds=[4, 1],
    occurrence=7,
    module="cell",
    decoys=["aten::addmm", "aten::sigmoid", "aten::where", "aten::mul"],
    fix="eps in the denominator",
)


class Cell(nn.Module):
    """A gated cell with a memory of slots, written out."""

    def __init__(self, d, h, slots=3):
        super().__init__()
        self.gates, self.cand = nn.Linear(d + h, 2 * h), nn.Linear(d + h, h)
        self.key, self.norm = nn.Linear(h, slots), nn.LayerNorm(h)
        self.read = nn.Linear(h, h)

    def forward(self, frame, state, memory, live):
        total = frame.sum(-1, keepdim=True)
        if FIX:
            total = total + 1e-6
        share = frame / total  # CULPRIT
        share = torch.where(live, share, torch.zeros_like(share))
        both = torch.cat([share, state], -1)
        update, reset = torch.sigmoid(self.gates(both)).chunk(2, -1)
        new = torch.tanh(self.cand(torch.cat([share, reset * state], -1)))
        where = self.key(state).softmax(-1).unsqueeze(-1)
        memory = torch.where(live.unsqueeze(-1), memory + where * new.unsqueeze(1), memory)
        state = (1 - update) * state + update * new + self.read((where * memory).sum(1))
        return torch.where(live, self.norm(state), state), memory


class Transcriber(nn.Module):
    def __init__(self, d=6, h=12, classes=5):
        super().__init__()
        self.cell, self.out = Cell(d, h), nn.Linear(h, classes)
        self.h = h

    def forward(self, frames, live):
        state = frames.new_zeros(len(frames), self.h)
        memory, logits = frames.new_zeros(len(frames), 3, self.h), []
        for t in range(frames.shape[1]):
            state, memory = self.cell(frames[:, t], state, memory, live[:, t, None])
            logits.append(self.out(state))
        return torch.stack(logits, 1)


def loss_fn(model, frames, live, target):
    logits = model(frames, live)
    with torch.no_grad():
        energy = frames.sum(-1).log10()  # -inf where silent or padded
        model.loudness = energy.mean(), energy.std()
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    smooth = logits.diff(dim=1).square().mean()
    return loss[live.flatten()].mean() + 1e-2 * smooth


def build():
    torch.manual_seed(0)
    live = torch.ones(3, 10, dtype=torch.bool)
    live[0, :2], live[1, 8:] = False, False
    frames = torch.rand(3, 10, 6) * live.unsqueeze(-1)
    frames[2, 6] = 0  # a rest in the music
    return Transcriber(), (frames, live, torch.randint(0, 5, (3, 10))), loss_fn


def make_optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)
