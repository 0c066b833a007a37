"""Evaluate: `evaluate` a checkpoint beside classical estimates and the bound."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from ris_model.commands.options import answering_wrong_input, ask_whole, need_extra


def evaluate(  # noqa: PLR0913  the options of the command
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a run, or a checkpoint in it.")],
    *,
    snr: Annotated[str, typer.Option(help="dB, separated by commas.")] = "0,5,10,20",
    sources: Annotated[str, typer.Option(help="K, separated by commas; all without.")] = "",
    scenes: Annotated[int, typer.Option(help="Of each K and SNR.")] = 128,
    slow_scenes: Annotated[int, typer.Option(help="Of those for ML and the scans.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the test scenes.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Folder for the figures.")] = None,
) -> None:
    """Tabulate network, fits, classical estimates and the Cramer-Rao bound by K and SNR.

    Times are those of this processor, in batches of 64; the slow methods see fewer scenes.
    """
    from ris_model.evaluation.methods import load_tools
    from ris_model.evaluation.table import Request, draw_scenes
    from ris_model.evaluation.table import evaluate as run
    from ris_model.evaluation.text import describe_scenes, write_table

    with answering_wrong_input():
        if plot is not None:
            need_extra("matplotlib")
        tools = load_tools(checkpoint)
        config = tools.config
        most = config.scenario.sources
        request = Request(
            snrs=tuple(_read_numbers("--snr", snr)),
            sources=tuple(_read_sources(sources, most)),
            scenes=ask_whole("--scenes", scenes, 1),
            slow_scenes=ask_whole("--slow-scenes", slow_scenes, 0),
            seed=ask_whole("--seed", seed, 0),
        )
        table = run(tools, request, tell=lambda line: typer.echo(line, err=True))
        for line in (describe_scenes(config.scenario), "", *write_table(table)):
            typer.echo(line)
        if plot is not None:
            from ris_model.evaluation.figures import plot_errors, plot_spectra

            (batch, *_) = draw_scenes(
                config.scenario, sources=request.sources[-1], scenes=1, seed=request.seed
            )
            for path in (*plot_errors(table, plot), plot_spectra(tools, batch, plot)):
                typer.echo(f"wrote {path}")


def _read_numbers(name: str, text: str) -> list[float]:
    """Numbers separated by commas."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        msg = f"{name} is {text!r}; give numbers separated by commas, as in 0,10,20"
        raise ValueError(msg)
    return numbers


def _read_sources(text: str, most: int) -> list[int]:
    """Numbers of sources separated by commas; all without."""
    if not text:
        return list(range(1, most + 1))
    numbers = _read_numbers("--sources", text)
    if not all(n == int(n) and 1 <= n <= most for n in numbers):
        msg = f"--sources is {text!r}; give whole numbers from 1 to {most}, separated by commas"
        raise ValueError(msg)
    return [int(n) for n in numbers]
