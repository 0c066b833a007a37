"""A gradient penalty, and a critic that is flat somewhere: `python examples/gradient_penalty.py`.

The penalty is the norm of a gradient, so its backward is a second derivative; where the gradient is
exactly 0, the norm written by hand has the slope 1/0. It takes one black image at
which every unit of the critic is off. The loss is finite throughout.
"""

import rich
import torch
from torch import Tensor, nn

import nanhunt
from nanhunt.report import renderer


class Critic(nn.Module):
    """Two layers; a ReLU has the gradient 0 where it is off."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
        nn.init.uniform_(self.layers[0].bias, -0.1, 0.0)  # as training may leave them

    def forward(self, images: Tensor) -> Tensor:
        """One score per image `[B, 16]`."""
        return self.layers(images).squeeze(-1)


def loss(critic: nn.Module, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """The critic's two terms: the distance, and how far its slope is from 1."""
    mixed = (0.5 * real + 0.5 * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    norm = slope.square().sum(-1).sqrt()
    return {
        "distance": critic(fake).mean() - critic(real).mean(),
        "penalty": 10 * (norm - 1).square().mean(),
    }


def build() -> nanhunt.Subject:
    """The critic's step; the last pair of images is black, which turns every unit off."""
    torch.manual_seed(0)
    critic = Critic()
    real, fake = torch.randn(8, 16), torch.randn(8, 16)
    real[-1] = fake[-1] = 0.0
    return nanhunt.Subject(
        critic, [(real, fake)], loss, optimizer=torch.optim.Adam(critic.parameters(), 1e-4)
    )


if __name__ == "__main__":
    rich.print(renderer("terminal")(nanhunt.hunt(build())))
