"""FP16 autocast, and attention scores that overflow: `python examples/transformer_amp.py`.

The scores are not divided by the root of the width: in FP32 the softmax is only sharp, in FP16 they
pass 65504, and `inf - inf` is NaN. nanhunt names the product, and that it is finite in FP32. The
cure is the one of the paper, before the product: `build(scaled=True)` is healthy.
"""

import rich
import torch
from torch import Tensor, nn

import nanhunt
from nanhunt.report import renderer

WIDTH, HEADS, TOKENS = 64, 2, 12


class Attention(nn.Module):
    """Causal attention, written by hand."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[B, T, C]` to tokens."""
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = (q * self.scale) @ k.transpose(-2, -1)
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(ahead, -torch.inf).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One block that reads tokens of a large norm, as late layers of a trained model do."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.attention, self.head = Attention(scale), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """One number each."""
        return self.head(x + self.attention(x)).mean((1, 2))


def build(*, scaled: bool = False) -> nanhunt.Subject:
    """The step as its training script has it: the model under FP16 autocast, the loss outside."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            out = model(x)
        return (out.float() - y).abs().mean()

    model = Block((WIDTH / HEADS) ** -0.5 if scaled else 1.0)
    return nanhunt.Subject(model, [(150 * torch.randn(4, TOKENS, WIDTH), torch.randn(4))], loss)


if __name__ == "__main__":
    rich.print(renderer("terminal")(nanhunt.hunt(build())))
