"""The branch that `where` did not take, and its gradient: `python examples/double_where.py`.

The value of the branch is masked; its gradient is not: 0 times infinity is NaN. The cure is a
second `where` around the argument, and both are run here.
"""

import rich
import torch
from torch import Tensor, nn

import nanhunt
from nanhunt.records import Report
from nanhunt.report import renderer


class Spectrum(nn.Module):
    """A learned filter and the logarithm of its energy, 0 where there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(5))
        self.is_safe = False

    def forward(self, x: Tensor) -> Tensor:
        """Log energies `[B, F]` of spectra `[B, F]`."""
        energy = (self.gain * x).square()
        is_silent = energy == 0
        if self.is_safe:
            energy = torch.where(is_silent, 1, energy)  # the second where
        return torch.where(is_silent, 0, energy.log())


def step(*, is_safe: bool = False) -> tuple[nn.Module, tuple[Tensor], object]:
    """The step; one bin of the batch is silent."""
    model = Spectrum()
    model.is_safe = is_safe
    spectra = torch.tensor([[1.0, 2.0, 0.0, 0.5, 3.0], [2.0, 1.0, 1.0, 0.1, 0.4]])
    return model, (spectra,), lambda model, x: model(x).square().mean()


def main() -> tuple[Report, Report]:
    """The report of the step as it was, and of the cured one."""
    reports = nanhunt.hunt(step()), nanhunt.hunt(step(is_safe=True))
    rich.print(*map(renderer("terminal"), reports))
    return reports


if __name__ == "__main__":
    main()
