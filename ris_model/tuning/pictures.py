"""Pictures: how a study went, and what its values depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from optuna.trial import FrozenTrial, TrialState

from ris_model.tuning.study import PENALTY

_COLUMNS = 4
_DECADE = 10


def draw_history(study: optuna.Study, path: Path) -> None:
    """Draw the value of every trial and the best so far, as PNG."""
    good, pruned = _list_trials(study)
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.plot([t.number for t in good], [_read(t) for t in good], "o", label="trial")
    if pruned:
        shown = [(t.number, _read(t)) for t in pruned]
        axes.plot(*zip(*shown, strict=True), "x", color="0.6", label="pruned, last epoch")
    best = [min(_read(t) for t in good[: n + 1]) for n in range(len(good))]
    axes.step([t.number for t in good], best, where="post", label="best so far")
    axes.set(xlabel="trial", ylabel="validation loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    figure.savefig(path, dpi=120)


def draw_parameters(study: optuna.Study, path: Path) -> None:
    """Draw the value over each parameter that was searched, as PNG."""
    good, _ = _list_trials(study)
    names = sorted({name for trial in good for name in trial.params})
    rows = max(1, -(-len(names) // _COLUMNS))
    figure = Figure(figsize=(3.0 * _COLUMNS, 2.4 * rows), layout="constrained")
    grid = figure.subplots(rows, _COLUMNS, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        having = [t for t in good if name in t.params]
        values = [t.params[name] for t in having]
        axes.plot(values, [_read(t) for t in having], "o", ms=3)
        axes.set(xlabel=name)
        _scale(axes, values, log=getattr(having[0].distributions[name], "log", False))
    for axes in grid[:, 0]:
        axes.set(ylabel="validation loss")
    for axes in list(grid.flat)[len(names) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=120)


def _scale(axes: Axes, values: list[Any], *, log: bool) -> None:
    """Choose ticks that do not run into each other; a logarithm from a decade on."""
    if log and max(values) >= _DECADE * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    elif all(isinstance(value, int | float) for value in values):
        whole = all(isinstance(value, int) for value in values)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=whole))


def _list_trials(study: optuna.Study) -> tuple[list[FrozenTrial], list[FrozenTrial]]:
    """Trials with an objective of their own, and those that were ended early."""
    good = [t for t in study.get_trials(states=(TrialState.COMPLETE,)) if t.value != PENALTY]
    pruned = [t for t in study.get_trials(states=(TrialState.PRUNED,)) if t.intermediate_values]
    return good, pruned


def _read(trial: FrozenTrial) -> float:
    """Objective of a trial, or its last report."""
    if trial.state is TrialState.COMPLETE and trial.value is not None:
        return trial.value
    return trial.intermediate_values[max(trial.intermediate_values)]
