"""Journal: what a run tells while it goes on; its metrics as CSV and for TensorBoard."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ris_model.storage import write_whole


@dataclass(frozen=True, slots=True)
class Epoch:
    """An epoch at its end."""

    number: int  # from 1
    epochs: int
    phase: str
    step: int  # batches seen
    made: int  # steps that changed the parameters
    train: float  # mean loss of the steps made in it; nan without one
    val: float
    terms: Mapping[str, float]  # of the validation loss, weighted
    k_right: float  # share of the validation scenes whose number of sources is right
    rates: tuple[float, ...]  # of each group of parameters
    skipped: int  # steps of the epoch
    scale: float | None  # of the loss under FP16
    seconds: float

    def write_lines(self, weights: Mapping[str, float]) -> Iterator[str]:
        """Write the lines of a training log about it."""
        rates = ",".join(f"{rate:.3e}" for rate in self.rates)
        yield f"[LR] epoch={self.number:03d} groups={len(self.rates)} lr={rates}"
        yield f"[OPT] step {self.made} / batch {self.step}"
        shown = " ".join(
            f"{name}={weights[name]:g}"
            for name in ("lam_cross", "lam_gap", "lam_K")
            if name in weights
        )
        yield (
            f"Epoch {self.number:03d}/{self.epochs:03d} [{self.phase}] train {self.train:.6f}  "
            f"val {self.val:.6f}  ({shown})"
        )

    def list_metrics(self) -> dict[str, float]:
        """Numbers of the epoch by name."""
        terms = {f"val_{name}": value for name, value in self.terms.items()}
        return {
            "train": self.train,
            "val": self.val,
            "k_right": self.k_right,
            "rate": self.rates[0],
            "skipped": self.skipped,
            "scale": 1.0 if self.scale is None else self.scale,
            "seconds": self.seconds,
            **terms,
        }


class Listener(Protocol):
    """Somebody who is told how a run goes on; only the leading process tells."""

    def hear(self, line: str) -> None:
        """Take a line of the log."""

    def advance(self, step: int) -> None:
        """Take note that so many batches were seen."""

    def note(self, epoch: Epoch) -> None:
        """Take an epoch at its end."""

    def close(self) -> None:
        """Let go; the run is over."""


class Deaf:
    """A listener to nothing, to be extended."""

    def hear(self, line: str) -> None:
        """Ignore it."""

    def advance(self, step: int) -> None:
        """Ignore it."""

    def note(self, epoch: Epoch) -> None:
        """Ignore it."""

    def close(self) -> None:
        """Nothing is held."""


class Table(Deaf):
    """metrics.csv, a row per epoch; rows of epochs that a resumed run repeats are dropped."""

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.is_file() and step:
            with path.open(newline="", encoding="utf-8") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]

    def note(self, epoch: Epoch) -> None:
        """Write the table anew with one row more."""
        place = {"epoch": epoch.number, "step": epoch.step, "phase": epoch.phase}
        self.rows.append({**place, **epoch.list_metrics()})
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=list(self.rows[-1]), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.path, text.getvalue().encode())


class Board(Deaf):
    """Event files for TensorBoard."""

    def __init__(self, folder: Path, *, step: int) -> None:
        """Open a file; ImportError where TensorBoard is not installed."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=step)

    def note(self, epoch: Epoch) -> None:
        """Write every metric of the epoch."""
        for name, value in epoch.list_metrics().items():
            self.writer.add_scalar(name, value, epoch.step)
        self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        self.writer.close()
