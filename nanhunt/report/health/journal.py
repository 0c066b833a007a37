"""The figures of a run as a CSV file: a line per step, there as soon as the step is over.

A log never hurts the training: a file that cannot be opened is refused at the start, and one that
cannot be written later is given up with one warning.
"""

import csv
import io
import os
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from nanhunt.errors import StoreError
from nanhunt.records import Figures
from nanhunt.report.health.columns import columns_of, row_of
from nanhunt.report.health.reading import SIGNATURE, read_head


class Journal:
    """Appends steps to a file; one that was there already goes on, without its torn last line."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the file.

        Raises:
            StoreError: it cannot be written, or holds something else.
        """
        self.path = Path(path)
        self._columns: Sequence[str] = ()
        self._file: IO[bytes] | None = None
        try:
            if self.path.exists() and self.path.stat().st_size:
                self._columns = read_head(self.path)  # before a byte of it is touched
                _mend(self.path)
            self._file = self.path.open("ab" if self._columns else "wb")
            # A training that logs to it holds nothing that it would close.
            weakref.finalize(self, self._file.close)
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise StoreError(f"{self.path}: cannot be written ({why})") from None

    def __call__(self, figures: Figures) -> None:
        """Write a step, and see that it leaves this process."""
        if self._file is None:
            return
        try:
            if not self._columns:
                self._columns = [_printable(name) for name in columns_of(figures)]
                self._file.write(f"{SIGNATURE}\n{_line(self._columns)}".encode())
            self._file.write(_line(row_of(figures, self._columns)).encode())
            self._file.flush()
        except (OSError, ValueError) as error:
            self._file = None
            warnings.warn(
                f"nanhunt: {self.path} cannot be written ({error}); training goes on without it",
                RuntimeWarning,
                stacklevel=2,
            )

    def close(self) -> None:
        """Close the file; further steps are ignored."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _line(cells: Sequence[str]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _printable(name: str) -> str:
    """A name that stays on its line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def _mend(path: Path) -> None:
    """Cut what follows the last whole line: a process was killed while it wrote."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        kept, tail = end, b""
        while kept and b"\n" not in tail:
            start = max(0, kept - 4096)
            file.seek(start)
            tail = file.read(kept - start)
            kept = start + tail.rfind(b"\n") + 1 if b"\n" in tail else start
        if kept != end:
            file.truncate(kept)
