"""A small ResNet, written as people write them, and nothing of nanhunt in it.

`build` returns what a gate needs: the model, a batch and the loss. `nanhunt gate --config
examples/gate.toml` gates it, `nanhunt replay examples/resnet.py:build` examines it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES, WIDTHS = 10, (16, 32, 64)


class Residual(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)
        self.conv_2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.norm_1, self.norm_2 = nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)
        is_same = (inner, stride) == (outer, 1)
        self.around = nn.Identity() if is_same else nn.Conv2d(inner, outer, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, C, H, W]` to images of another width and size."""
        y = F.relu(self.norm_1(self.conv_1(x)))
        return F.relu(self.norm_2(self.conv_2(y)) + self.around(x))


class ResNet(nn.Module):
    """A stem, one residual block per width, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTHS[0], 3, padding=1)
        pairs = zip((WIDTHS[0], *WIDTHS), WIDTHS, (1, 2, 2), strict=False)
        self.blocks = nn.Sequential(*(Residual(*pair) for pair in pairs))
        self.head = nn.Linear(WIDTHS[-1], CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, K]` of images `[B, 3, H, W]`."""
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy with smoothed labels."""
    return F.cross_entropy(model(images), labels, label_smoothing=0.1)


def build() -> tuple[nn.Module, tuple[Tensor, Tensor], Callable[..., Tensor]]:
    """The model, a batch of sixteen images, and the loss."""
    return ResNet(), (torch.randn(16, 3, 32, 32), torch.randint(CLASSES, (16,))), loss
