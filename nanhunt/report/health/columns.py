"""A step as one row of named cells, and back. What is not finite is counted, and its cell empty."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from nanhunt.records import Figures, Why

Cell = float | int | str | None

PLAIN = (
    "step", "loss", "loss_nonfinite", "stepped", "why", "nonfinite", "scale", "clipped",
    "scheduled", "seconds", "inside", "validation", "validation_nonfinite", "notes",
)  # fmt: skip
OTHER = "other"  # what a later step has and the head of the file lacks, as JSON
_WHYS = get_args(Why)


def columns_of(figures: Figures) -> list[str]:
    """The names of the columns, as the first step of a run has them."""
    cells = list(cells_of(figures))
    return [*PLAIN, *(name for name in cells if name not in PLAIN), OTHER]


def cells_of(figures: Figures) -> dict[str, Cell]:
    """Everything about a step by the names of columns."""
    f = figures
    cells: dict[str, Cell] = {
        "step": f.step,
        "loss": _finite(f.loss),
        "loss_nonfinite": int(_finite(f.loss) is None and f.why != "raised"),
        "stepped": int(f.stepped),
        "why": f.why,
        "nonfinite": f.nonfinite,
        "scale": _finite(f.scale),
        "clipped": _finite(f.clipped),
        "scheduled": None if f.scheduled is None else int(f.scheduled),
        "seconds": _finite(f.seconds),
        "inside": _finite(f.inside),
        "validation": _finite(f.validation),
        "validation_nonfinite": int(_finite(f.validation) is None) if f.validated else None,
        "notes": json.dumps(list(f.notes)) if f.notes else None,
    }
    return cells | dict(_grouped(f))


def _grouped(figures: Figures) -> Iterator[tuple[str, Cell]]:
    for i, rate in enumerate(figures.rates):
        yield f"rate:{i}", _finite(rate)
    for name, norm in figures.norms:
        yield f"norm:{name}", _finite(norm)
        yield f"nonfinite:{name}", int(_finite(norm) is None)
    measured = dict(figures.updates)
    for name in dict.fromkeys([*(name for name, _ in figures.norms), *measured]):
        yield f"update:{name}", _finite(measured.get(name))


def row_of(figures: Figures, columns: Sequence[str]) -> list[str]:
    """The cells of a step as text, in the order of the columns of a file."""
    cells = cells_of(figures)
    rest = {n: v for n, v in cells.items() if n not in columns and v is not None}
    cells[OTHER] = json.dumps(rest) if rest else None
    return [_written(cells.get(name)) for name in columns]


def figures_of(cells: Mapping[str, str]) -> Figures:
    """The step that a row tells of.

    Raises:
        ValueError: a cell does not hold what its column says.
    """
    known = {name: text for name, text in cells.items() if text != ""}
    if OTHER in known:
        rest = json.loads(known.pop(OTHER))
        if not isinstance(rest, dict):
            raise ValueError(f"{OTHER}: no table of cells")
        known |= {str(name): str(value) for name, value in rest.items()}
    why: Any = known.get("why", "")
    if why not in _WHYS:
        raise ValueError(f"why: {why!r}")
    validation = _number(known, "validation")
    notes = json.loads(known.get("notes", "[]"))
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise ValueError("notes: no list of sentences")
    return Figures(
        _whole(known, "step"),
        _number(known, "loss"),
        stepped=_whole(known, "stepped") != 0,
        why=why,
        norms=tuple(_norms(known)),
        nonfinite=_whole(known, "nonfinite"),
        scale=_number(known, "scale"),
        rates=tuple(value for _, value in _prefixed(known, "rate:")),
        clipped=_number(known, "clipped"),
        updates=tuple(_prefixed(known, "update:")),
        scheduled=_whole(known, "scheduled") != 0 if "scheduled" in known else None,
        seconds=_number(known, "seconds") or 0.0,
        inside=_number(known, "inside") or 0.0,
        notes=tuple(notes),
        validated="validation_nonfinite" in known or validation is not None,
        validation=validation,
    )


def _norms(cells: Mapping[str, str]) -> Iterator[tuple[str, float | None]]:
    for name in cells:
        if name.startswith("nonfinite:"):
            group = name.partition(":")[2]
            yield group, _number(cells, f"norm:{group}")


def _prefixed(cells: Mapping[str, str], prefix: str) -> Iterator[tuple[str, float]]:
    for name in cells:
        value = _number(cells, name) if name.startswith(prefix) else None
        if value is not None:
            yield name.removeprefix(prefix), value


def _number(cells: Mapping[str, str], name: str) -> float | None:
    """A finite number; None where the cell is empty or holds what is not finite."""
    if name not in cells:
        return None
    try:
        return _finite(float(cells[name]))
    except ValueError:
        raise ValueError(f"{name}: {cells[name][:40]!r} is no number") from None


def _whole(cells: Mapping[str, str], name: str) -> int:
    value = _number(cells, name)
    if value is None or value != int(value):
        raise ValueError(f"{name}: {cells.get(name, '')[:40]!r} is no whole number")
    return int(value)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _written(cell: Cell) -> str:
    return "" if cell is None else str(cell)
