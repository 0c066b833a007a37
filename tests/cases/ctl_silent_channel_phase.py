"""Healthy: magnitude and phase of the spectrum of a silent channel; abs and angle of the complex 0
have a defined gradient of 0, although 0/0 is written in their formulas."""

import torch
from torch import nn

CASE = dict(
    id="ctl_silent_channel_phase",
    source="",
    phase="none",
    op=None,
    node=None,
    marker="CULPRIT",
    cause="healthy",
    precision="any",
    decoys=["aten::abs", "aten::angle", "aten::_fft_r2c", "AbsBackward0", "AngleBackward0"],
    fix="",
)


class Echo(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([[1.0], [0.5], [2.0]]))
        self.mix = nn.Linear(9, 4)

    def forward(self, wave):
        spectrum = torch.fft.rfft(self.gain * wave)
        return self.mix(spectrum.abs() + 0.1 * spectrum.angle())


def build():
    torch.manual_seed(0)
    wave = torch.randn(3, 16)
    wave[1] = 0.0
    return Echo(), (wave, torch.randn(3, 4)), lambda m, w, t: (m(w) - t).abs().mean()
