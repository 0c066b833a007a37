"""A file of figures read back: nanhunt's own, or the CSV of another logger where its columns map.

Nothing is executed, and a last line that is torn is left out and said.
"""

import csv
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from nanhunt.errors import StoreError
from nanhunt.records import Figures
from nanhunt.report.health.columns import PLAIN, figures_of

SCHEMA = 1
SIGNATURE = f"# nanhunt figures, schema {SCHEMA}"
_BEGINNING = SIGNATURE.rpartition(" ")[0]
LIMIT = 256 * 2**20  # of a file; beyond it, memory would be what limits
_LINE = 2**20

# What other loggers call it, the most telling first.
_FOREIGN: Mapping[str, tuple[str, ...]] = {
    "step": ("step", "global_step", "iteration", "iter", "epoch"),
    "loss": (
        "loss", "train_loss", "train/loss", "loss_step", "train_loss_step", "train",
        "training_loss",
    ),
    "validation": (
        "val_loss", "val", "valid_loss", "validation_loss", "eval_loss", "val/loss", "eval/loss",
    ),
    "rate:0": ("lr", "rate", "learning_rate", "train/lr", "train/learning_rate"),
    "norm:all": ("grad_norm", "gradient_norm", "train/grad_norm", "norm"),
    "scale": ("scale", "loss_scale", "amp_scale"),
    "seconds": ("seconds",),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Record:
    """What a file holds: the steps, what a row of it is, and what is to be said of it."""

    figures: tuple[Figures, ...]
    unit: str = "step"
    notes: tuple[str, ...] = ()


def read(path: str | os.PathLike[str]) -> Record:
    """Read the figures of a run.

    Raises:
        StoreError: there is no such file, it holds no figures, or those of another version.
    """
    place = Path(path)
    try:
        if place.is_dir():
            raise StoreError(f"{place}: it is a folder; give the CSV file in it")
        if (size := place.stat().st_size) > LIMIT:
            raise StoreError(
                f"{place}: {size} bytes, more than {LIMIT}; give its head and its last lines"
            )
        with place.open(encoding="utf-8-sig", newline="") as file:
            return _read(_Lines(file), place)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise StoreError(f"{place}: cannot be read ({why}); give a CSV file of figures") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise StoreError(f"{place}: no CSV in UTF-8 ({error})") from None


def read_head(path: Path) -> Sequence[str]:
    """The columns of a file of nanhunt's own, to which steps are to be appended.

    None where its head was never written whole.

    Raises:
        StoreError: it is something else.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = _Lines(file)
            first = next(lines, "")
            if lines.torn and SIGNATURE.startswith(path.read_text(encoding="utf-8")):
                return ()
            if not _is_own(first, path):
                raise StoreError(
                    f"{path}: no figures of nanhunt's; name a new file, or the one to go on with"
                )
            head = next(csv.reader(lines, strict=True), [])
            return _columns(head, path) if head else ()
    except (csv.Error, UnicodeDecodeError) as error:
        raise StoreError(f"{path}: no CSV in UTF-8 ({error})") from None


class _Lines:
    """The whole lines of a file; whether there was a torn one after them."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self.torn = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline(_LINE)
        if not line:
            raise StopIteration
        if not line.endswith("\n"):
            if len(line) == _LINE:
                raise csv.Error(f"a line is longer than {_LINE} characters")
            self.torn = True
            raise StopIteration
        return line


def _read(lines: _Lines, path: Path) -> Record:
    first = next(lines, "")
    if not first and not lines.torn:
        raise StoreError(f"{path}: the file is empty; give one that holds steps")
    is_own = _is_own(first, path)
    rows = csv.reader(lines if is_own else itertools.chain([first], lines), strict=True)
    columns = next(rows, [])
    if is_own:
        _columns(columns, path)
        figures, unit = tuple(_own(rows, columns, path)), "step"
    else:
        names = _mapped(columns, path)
        figures, unit = tuple(_foreign(rows, columns, names, path)), _unit(names["step"])
    if not figures:
        raise StoreError(f"{path}: no whole line after the head; nothing was logged yet")
    return Record(figures, unit, tuple(_notes(figures, lines, is_own=is_own, unit=unit)))


def _is_own(line: str, path: Path) -> bool:
    """Whether the first line is nanhunt's, of the schema that is read here."""
    if not line.startswith(_BEGINNING):
        return False
    if line.strip() != SIGNATURE:
        found = line.strip().removeprefix(_BEGINNING).strip()[:20]
        raise StoreError(f"{path}: schema {found} of figures; this nanhunt reads schema {SCHEMA}")
    return True


def _columns(columns: Sequence[str], path: Path) -> Sequence[str]:
    missing = [name for name in PLAIN if name not in columns]
    if missing or len(set(columns)) < len(columns):
        what = f"the columns {', '.join(missing)} are missing" if missing else "a column is twice"
        raise StoreError(f"{path}: {what}; found {_listed(columns)}")
    return columns


def _own(rows: Iterator[list[str]], columns: Sequence[str], path: Path) -> Iterator[Figures]:
    for number, row in enumerate(rows, start=3):
        if len(row) != len(columns):
            raise StoreError(
                f"{path}: line {number} has {len(row)} cells, the head has {len(columns)}"
            )
        try:
            yield figures_of(dict(zip(columns, row, strict=True)))
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{path}: line {number}: {error}") from None


def _mapped(columns: Sequence[str], path: Path) -> dict[str, str]:
    """The columns of another logger by the names that they have here."""
    by_lower = {name.strip().lower(): name for name in columns}
    found = {
        name: by_lower[match]
        for name, others in _FOREIGN.items()
        if (match := next((other for other in others if other in by_lower), None))
    }
    if "loss" not in found or "step" not in found:
        raise StoreError(
            f"{path}: no columns of a step and its loss ({', '.join(_FOREIGN['step'])}; "
            f"{', '.join(_FOREIGN['loss'])}); found {_listed(columns)}"
        )
    if "epoch" in by_lower and len(columns) and columns[0].strip().lower() == "epoch":
        found["step"] = by_lower["epoch"]  # a row per epoch
    return found


def _unit(column: str) -> str:
    return "epoch" if column.strip().lower() == "epoch" else "step"


def _foreign(
    rows: Iterator[list[str]], columns: Sequence[str], names: Mapping[str, str], path: Path
) -> Iterator[Figures]:
    """Steps with a loss; what a row without one tells belongs to the step before."""
    held: Figures | None = None
    for number, row in enumerate(rows, start=2):
        given = dict(zip(columns, row, strict=False))
        cells = {name: given.get(column, "").strip() for name, column in names.items()}
        try:
            now = figures_of(_completed(cells))
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{path}: line {number}: {error}") from None
        if cells["loss"] or held is None:
            if held is not None:
                yield held
            held = now if cells["loss"] else None
        elif now.validated:
            held = replace(held, validated=True, validation=now.validation)
    if held is not None:
        yield held


def _completed(cells: Mapping[str, str]) -> dict[str, str]:
    """The cells of another logger, with what nanhunt's own files say besides."""
    full = dict(cells)
    lost = full["loss"].lower() in ("nan", "inf", "-inf")
    full |= {"stepped": str(int(not lost)), "why": "loss" if lost else "", "nonfinite": "0"}
    if full.get("norm:all"):
        full["nonfinite:all"] = "0"
    if full.get("validation"):
        full["validation_nonfinite"] = "0"
    return full


def _notes(figures: Sequence[Figures], lines: _Lines, *, is_own: bool, unit: str) -> Iterator[str]:
    if lines.torn:
        yield "the last line is torn and was left out"
    if not is_own:
        yield f"the file is another logger's: a row is {'an' if unit == 'epoch' else 'a'} {unit}"
    again = sum(b.step <= a.step for a, b in itertools.pairwise(figures))
    if again:
        yield f"the count of steps goes back {again} times: the run was started again"


def _listed(columns: Sequence[str]) -> str:
    shown = ", ".join(name[:30] for name in columns[:12]) or "none"
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)
    return f"{text}, …" if len(columns) > 12 else text
