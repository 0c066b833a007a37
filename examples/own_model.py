"""Hunt a NaN in your own model: hand over the model, one batch and the loss.

The loss is finite and one gradient is not: `where` hides log(0) in the forward only.
Run it with `python examples/own_model.py`.
"""

import torch
from rich import print as show
from torch import Tensor, nn

import nanhunt
from nanhunt.report import renderer


class Rate(nn.Module):
    """A positive rate per feature and its logarithm, where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, counts: Tensor) -> Tensor:
        """Log rates `[B, 3]` of counts `[B, 3]`; 0 where the count is 0."""
        rate = counts * self.scale
        return torch.where(rate > 0, torch.log(rate), torch.zeros(()))


def loss(model: nn.Module, counts: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of the log rates."""
    return (model(counts) - target).square().mean()


def main() -> nanhunt.Report:
    """Hunt, and print the report."""
    counts = torch.tensor([[3.0, 0.0, 1.0], [2.0, 5.0, 4.0]])
    report = nanhunt.hunt((Rate(), (counts, torch.zeros(2, 3)), loss))
    show(renderer("terminal")(report))
    return report


if __name__ == "__main__":
    main()
