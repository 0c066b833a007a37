"""Figures: error over SNR, and the spectra of one scene."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ris_model.data import Batch
from ris_model.estimate.fit import bound_places
from ris_model.estimate.spectra import ScanGrid, scan, scan_ceiling
from ris_model.evaluation.methods import Tools
from ris_model.evaluation.table import Table
from ris_model.geometry import place_points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_AXES = ("median |azimuth error|, deg", "median |elevation error|, deg", "median |range error|, m")


def plot_errors(table: Table, folder: Path) -> list[Path]:
    """Draw the median errors of every method over the SNR, one figure for each K."""
    return [_plot_sources(table, k, folder) for k in sorted({row.sources for row in table.rows})]


def plot_spectra(tools: Tools, batch: Batch, folder: Path, *, scene: int = 0) -> Path:
    """Draw heat map, MUSIC of the samples and MUSIC of the noise-free label of one scene."""
    one = torch.tensor([scene])
    count, r_samp, r_true = batch.count[one], batch.r_samp[one], batch.r_true[one]
    world = tools.config.scenario
    maps: dict[str, torch.Tensor] = {}
    edges = _list_edges(tools)
    with torch.inference_mode():
        images = tools.imaging.measure(batch.y[one], batch.h[one], batch.codes[one])
        maps["whitened image"] = _fold(images[0, -1], tools).clamp_min(1e-12).log()
        if tools.model is not None:
            heat = tools.model(_select(batch, one)).heat[0].log_softmax(-1)
            maps["heat map of the network"] = _fold(heat, tools)
        maps["MUSIC, samples, K known"] = scan(r_samp, world, kind="music", count=count).map[0]
        maps["MUSIC, noise-free label"] = scan_ceiling(r_true, world).map[0]
    true = place_points(batch.points[scene, : int(count)])
    half = (math.sin(world.azimuth_limit), math.sin(world.elevation_limit))
    figure, axes = _make_axes(1, len(maps), width=4.2, height=3.2)
    for axis, (title, values) in zip(axes, maps.items(), strict=True):
        x, y = edges["scan" if title.startswith("MUSIC") else "cells"]
        extent = (-x, x, -y, y)
        axis.imshow(values.numpy(), origin="lower", extent=extent, aspect="auto")
        axis.plot(true[:, 0], true[:, 1], "r+", markersize=12, label="true source")
        axis.set(title=title, xlabel="u_x", ylabel="u_y", xlim=(-half[0], half[0]))
        axis.set_ylim(-half[1], half[1])
    axes[0].legend(loc="lower right")
    return _save(figure, folder / "spectrum.png")


def _list_edges(tools: Tools) -> dict[str, tuple[float, float]]:
    """Outer edges in u_x and u_y of the first and last node of cells and scans."""
    _, high = bound_places(tools.config.scenario)
    grid, cells = ScanGrid(), tools.cells
    scan_edges = [
        float(h) * n / (n - 1) for h, n in zip(high, (grid.columns, grid.rows), strict=False)
    ]
    cell_edges = [step / 2 - start for start, step in zip(cells.start, cells.step, strict=True)]
    return {"scan": (scan_edges[0], scan_edges[1]), "cells": (cell_edges[0], cell_edges[1])}


def _plot_sources(table: Table, sources: int, folder: Path) -> Path:
    """One figure: azimuth, elevation and range."""
    rows = [row for row in table.rows if row.sources == sources]
    bounds = [bound for bound in table.bounds if bound.sources == sources]
    figure, axes = _make_axes(1, 3, width=4.6, height=4.0)
    for index, (axis, label) in enumerate(zip(axes, _AXES, strict=True)):
        scale = 1.0 if index == 2 else 180.0 / math.pi
        methods = dict.fromkeys(row.method for row in rows)
        for number, method in enumerate(methods):
            chosen = [row for row in rows if row.method == method]
            values = [scale * row.figures.median[index] for row in chosen]
            # larger ones first: where methods agree, all of them can still be seen
            style = {"markersize": 3.0 + 0.9 * (len(methods) - number), "fillstyle": "none"}
            axis.semilogy([row.snr_db for row in chosen], values, "o-", label=method, **style)
        limit = [scale * bound.sigma[index] for bound in bounds]
        axis.semilogy([b.snr_db for b in bounds], limit, "k--", label="0.674 sqrt(CRB)")
        axis.set(xlabel="SNR, dB", ylabel=label, title=f"K = {sources}")
        axis.grid(visible=True, which="both", alpha=0.3)
    axes[-1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _save(figure, folder / f"errors-k{sources}.png")


def _fold(values: torch.Tensor, tools: Tools) -> torch.Tensor:
    """Cells [G] to the largest value over the planes, [rows, columns]."""
    return values.view(tuple(reversed(tools.cells.counts))).amax(0)


def _select(batch: Batch, index: torch.Tensor) -> Batch:
    """One scene of a batch."""
    return Batch(**{name: getattr(batch, name)[index] for name in Batch.__slots__})


def _make_axes(
    rows: int, columns: int, *, width: float, height: float
) -> tuple[Figure, Sequence[Any]]:
    """A figure without a display, and its axes in a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def _save(figure: Figure, path: Path) -> Path:
    """Write a figure; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
