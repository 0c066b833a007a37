"""Predict: sources in a user's own measurements."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ris_model.commands.options import answering_wrong_input


def predict(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a run, or a checkpoint in it.")],
    file: Annotated[Path, typer.Argument(help="npz with y, H and codes.")],
    *,
    position_error: Annotated[
        float, typer.Option(help="Elements may be off by up to this, half wavelengths.")
    ] = 0.0,
) -> None:
    """Find the sources in measurements of your own; error bars from the bound at the estimate.

    The file holds y [n, L, M], H [n, M, N] or [M, N], codes [n, L, N] or [L, N], complex.
    """
    from rich.console import Console
    from rich.table import Table

    from ris_model.evaluation.methods import load_tools
    from ris_model.evaluation.prediction import predict as run
    from ris_model.evaluation.prediction import read_file

    with answering_wrong_input():
        if not 0 <= position_error <= 1:
            msg = f"--position-error is {position_error:g}; give a number from 0 to 1"
            raise ValueError(msg)
        tools = load_tools(checkpoint)
        reach = position_error * tools.config.scenario.wavelength / 2
        tools = replace(tools, plan=replace(tools.plan, reach=reach))
        found = run(tools, read_file(file, tools.config.scenario))
    table = Table("scene", "azimuth deg", "elevation deg", "range m", "SNR dB", "coherent")
    for source in found:
        (phi, theta, r), (a, b, c) = source.point, source.bar
        table.add_row(
            str(source.scene),
            f"{math.degrees(phi):.2f} ± {math.degrees(a):.2f}",
            f"{math.degrees(theta):.2f} ± {math.degrees(b):.2f}",
            f"{r:.3f} ± {c:.3f}",
            f"{source.snr_db:.1f}",
            "yes" if source.coherent else "no",
        )
    Console().print(table)
