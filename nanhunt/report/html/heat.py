"""Variants times ablations: every replay as one field, coloured by what it gave."""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

from nanhunt.records import Ablation, Group, Report, Run
from nanhunt.report.layout import number
from nanhunt.report.tables import norm, share

Kind = Literal["finite", "nonfinite", "raised", "missing"]


class Field(NamedTuple):
    """One replay: what came out, in a word and a figure; `heat` is the share that is poisoned."""

    kind: Kind
    word: str
    figure: str
    heat: float = 0.0


class HeatMap(NamedTuple):
    """The names of the columns, and for each variant its fields."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Field, ...]], ...]


_MISSING = Field("missing", "not run", "")


def heat_map(report: Report) -> HeatMap | None:
    """All replays in a grid; None where there is one replay or none to set side by side."""
    fields = dict(_fields(report))
    variants = dict.fromkeys(variant for variant, _ in fields)
    columns = dict.fromkeys(column for _, column in fields)
    if len(fields) < 2:
        return None
    rows = ((v, tuple(fields.get((v, c), _MISSING) for c in columns)) for v in variants)
    return HeatMap(tuple(columns), tuple(rows))


def _fields(report: Report) -> Iterator[tuple[tuple[str, str], Field]]:
    """Each replay under its variant and what was taken out; the runs as given come first."""
    for run in sorted(report.runs, key=lambda run: bool(run.ablated)):
        name = f"− {', '.join(run.ablated)}" if run.ablated else "as given"
        yield (run.variant, name), _of_run(run)
    for ablation in sorted(report.ablations, key=lambda a: a.mode == "alone"):
        mark = "−" if ablation.mode == "without" else "alone:"
        yield ("native", f"{mark} {', '.join(ablation.names)}"), _of_ablation(ablation)


def _of_run(run: Run) -> Field:
    if run.raised is not None:
        return Field("raised", "raised", "")
    if run.is_finite:
        return _finite(run.groups)
    if run.nonfinite:
        return _nonfinite(run.groups)
    if not math.isfinite(run.loss):
        return Field("nonfinite", "non-finite", f"loss {number(run.loss)}", 1.0)
    return Field("nonfinite", "non-finite", f"{run.stepped_nonfinite} stepped", 1.0)


def _of_ablation(ablation: Ablation) -> Field:
    if ablation.raised is not None:
        return Field("raised", "raised", "")
    if ablation.finite:
        return _finite(ablation.groups)
    if any(group.nonfinite for group in ablation.groups):
        return _nonfinite(ablation.groups)
    return Field("nonfinite", "non-finite", f"loss {number(ablation.loss)}", 1.0)


def _finite(groups: tuple[Group, ...]) -> Field:
    return Field("finite", "finite", f"‖g‖ {norm(groups)}")


def _nonfinite(groups: tuple[Group, ...]) -> Field:
    count, total = (
        sum(x) for x in zip(*((g.nonfinite, g.parameters) for g in groups), strict=True)
    )
    return Field("nonfinite", "non-finite", share(groups), count / max(total, 1))
