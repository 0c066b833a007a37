"""The figures of a run for whatever draws them: TensorBoard, another logger, a function."""

import os
from collections.abc import Callable
from typing import Protocol

from nanhunt.errors import UsageError
from nanhunt.records import Figures
from nanhunt.report.health.columns import cells_of
from nanhunt.report.health.journal import Journal


class Board(Protocol):
    """Anything that takes a number of a step by name, as TensorBoard's SummaryWriter does."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Take one number."""


Log = Callable[[Figures], object]


def numbers(figures: Figures) -> dict[str, float]:
    """The numbers of a step by name, for a logger that takes a dictionary; none is NaN."""
    return {
        name: float(value)
        for name, value in cells_of(figures).items()
        if isinstance(value, int | float) and name != "step"
    }


class Scalars:
    """Hands every number of a step to `add_scalar`, as `nanhunt/norm/backbone`."""

    def __init__(self, board: Board, prefix: str = "nanhunt/") -> None:
        self.board, self.prefix = board, prefix

    def __call__(self, figures: Figures) -> None:
        """Hand a step on."""
        for name, value in numbers(figures).items():
            self.board.add_scalar(f"{self.prefix}{name.replace(':', '/')}", value, figures.step)


def open_log(target: "str | os.PathLike[str] | Board | Log") -> Log:
    """Whatever takes the figures of a step: a CSV file by its name, a board, or a function.

    Raises:
        UsageError: it is none of these.
        StoreError: the file cannot be written.
    """
    if isinstance(target, str | os.PathLike):
        return Journal(target)
    if hasattr(target, "add_scalar"):
        return Scalars(target)
    if callable(target):
        return target
    raise UsageError(
        f"log is the name of a CSV file, something with add_scalar, or a function of Figures; "
        f"got {target!r}"
    )
