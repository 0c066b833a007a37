"""Console: the log of a run as lines, with a bar and the time left on a terminal."""

from __future__ import annotations

from rich.console import Console as Terminal
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ris_model.training.journal import Deaf


class Console(Deaf):
    """Plain lines; a bar below them where somebody looks."""

    def __init__(self, steps: int, *, step: int) -> None:
        self.terminal = Terminal(soft_wrap=True)
        self.bar: Progress | None = None
        if self.terminal.is_terminal:
            self.bar = Progress(
                TextColumn("batches"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.terminal,
            )
            self.task = self.bar.add_task("batches", total=steps, completed=step)
            self.bar.start()

    def hear(self, line: str) -> None:
        """Print it."""
        self.terminal.print(line, markup=False, highlight=False)

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.stop()
