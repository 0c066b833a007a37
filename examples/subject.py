"""A subject file for the command line: named loss terms, weights, and groups of parameters.

`nanhunt replay examples/subject.py:build --ablate w_spread` takes one term out and shows whether
that took effect, and what it changed.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import nanhunt


@dataclass
class Objective:
    """A loss of two terms whose weights can be set while it lives."""

    weights: dict[str, float] = field(default_factory=lambda: {"w_fit": 1.0, "w_spread": 0.1})

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Each weighted term by name; a term with weight 0 is not built."""
        z = model(x)
        terms = {"fit": lambda: (z.mean(-1) - y).square().mean()}
        # The standard deviation has an infinite slope where all values are equal.
        terms["spread"] = lambda: (z.var(-1, unbiased=False)).sqrt().mean()
        return {
            name: self.weights[f"w_{name}"] * term()
            for name, term in terms.items()
            if self.weights[f"w_{name}"]
        }

    def reweight(self, name: str, value: float) -> None:
        """Set one weight."""
        self.weights[name] = value


def build() -> nanhunt.Subject:
    """The subject; the second sample is zero, so its outputs are all equal."""
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))
    objective = Objective()
    batch = (torch.stack([torch.ones(4), torch.zeros(4)]), torch.tensor([0.5, 0.0]))
    return nanhunt.Subject(
        model,
        [batch],
        objective,
        name="spread",
        weights=lambda: objective.weights,
        reweight=objective.reweight,
        groups={"encoder": ["0"], "head": ["2"]},
    )
