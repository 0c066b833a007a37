"""Convolutional VAE whose instance norm takes the root of the variance of a dead channel.

The loss is finite.  The backward runs the smoothness term of the saliency image first: its roots of
zero send NaN to the image only, which is no parameter.  The channel roots of the encoder, later in
the backward, poison the weights below them.
"""

import torch
from torch import nn
from torch.nn import functional as F

FIX = False
CASE = dict(
    id="large_vae_saliency_leaf",
    source="",
    phase="backward",
    op="aten::sqrt",
    node="SqrtBackward0",
    marker="CULPRIT",
    cause="infinite_derivative_at_boundary",
    precision="any",
    kinds=[1],
    decoys=["aten::pow", "aten::mul", "aten::sub", "aten::convolution", "aten::log"],
    fix="eps inside the root",
    module="down.2.norm",
    occurrence=3,
)


class ChannelNorm(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(c, 1, 1))

    def forward(self, h):
        h = h - h.mean((2, 3), keepdim=True)
        var = h.square().mean((2, 3), keepdim=True)
        if FIX:
            var = var + 1e-5
        std = var.sqrt()  # CULPRIT
        return self.gain * h / (std + 1e-3)


class Down(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(i, o, 3, stride=2, padding=1), ChannelNorm(o)

    def forward(self, x):
        return F.elu(self.norm(self.conv(x)))


class Up(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(i, o, 3, padding=1), nn.GroupNorm(1, o)

    def forward(self, x):
        return F.elu(self.norm(self.conv(F.interpolate(x, scale_factor=2))))


class Vae(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([Down(1, 4), Down(4, 6), Down(6, 8), Down(8, 8)])
        self.mean, self.logvar = nn.Linear(32, 4), nn.Linear(32, 4)
        self.expand = nn.Linear(4, 32)
        self.up = nn.ModuleList([Up(8, 8), Up(8, 6), Up(6, 4), Up(4, 4)])
        self.out = nn.Conv2d(4, 1, 1)
        with torch.no_grad():  # a filter that was pruned
            self.down[2].conv.weight[5] = 0

    def forward(self, x):
        for layer in self.down:
            x = layer(x)
        h = x.flatten(1)
        mu, logvar = self.mean(h), self.logvar(h)
        z = mu + (0.5 * logvar).exp() * torch.linspace(-1, 1, 4)
        y = self.expand(z).view(-1, 8, 2, 2)
        for layer in self.up:
            y = layer(y)
        return self.out(y), mu, logvar


def loss_fn(model, image):
    image = image.clone().requires_grad_()
    y, mu, logvar = model(image)
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1).mean()
    with torch.no_grad():
        bits = torch.where(image > 0, image * image.log2(), torch.zeros_like(image))
        psnr = -10 * (image - image).square().mean().log10()  # of the identity: inf
        model.last = {"bits": bits.sum(), "psnr": psnr}
    rough = (image.diff(dim=2)[..., 1:].square() + image.diff(dim=3)[:, :, 1:].square()).sqrt()
    return F.mse_loss(y, image.detach()) + 1e-2 * kl + 1e-3 * rough.mean()


def build():
    torch.manual_seed(0)
    image = torch.rand(3, 1, 32, 32)
    image[0, :, :6, :6] = 0  # flat, so the roughness there is zero
    return Vae(), (image,), loss_fn


def make_optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)
