"""Figures of `docs/ris-model.md`: `python benchmarks/ris.py PART ... --checkpoint DIR`.

    main      every method by K and SNR on the preset `small`, beside the bound
    robust    the fits and maximum likelihood with known K where the receiver is wrong
    timing    milliseconds of processor time per scene, with K unknown, over those of the reference
    bound     medians of sqrt(CRB) of the preset `full` over a nearly scattered channel
    full      the fits with K = 3 and 5 on the preset `full`, and one from the true places

Train the checkpoint with `ris-model train --preset small --out DIR`; without one the rows of the
network are left out. Set OMP_NUM_THREADS=1 for times that can be compared.
"""

import argparse
import math
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ris_model.config import PRESETS, apply_profile
from ris_model.data import Batch
from ris_model.estimate.bound import bound_batch
from ris_model.estimate.field import lay_out_batch
from ris_model.estimate.localise import fit_sources
from ris_model.evaluation.figures import plot_errors, plot_spectra
from ris_model.evaluation.methods import (
    Answer,
    Method,
    Tools,
    gather_tools,
    list_methods,
    load_tools,
)
from ris_model.evaluation.table import Request, compare_bound, draw_scenes, evaluate, measure
from ris_model.evaluation.text import align, describe_scenes, write_median, write_table
from ris_model.geometry import name_places, place_points
from ris_model.metrics import Scores, summarise

FITS = (
    "network + fit",
    "network + fit, K known",
    "image + fit",
    "image + fit, K known",
    "image + fit, calibrated",
    "ML, K known",
)
# What the receiver does not know, or what the scenes have that the training had not; and the SNR.
CASES = {
    "clean": ({}, 10.0),
    "1-bit codes": ({"code_bits": 1}, 10.0),
    "positions 5 %": ({"position_error": 0.05}, 10.0),
    "positions 5 %, 20 dB": ({"position_error": 0.05}, 20.0),
    "channel -20 dB": ({"channel_error": -20.0}, 10.0),
    "channel -20 dB, 20 dB": ({"channel_error": -20.0}, 20.0),
    "coherent": ({"coherent": True}, 10.0),
    "power spread 0-10 dB": ({"power_spread": 10.0}, 10.0),
}
# A source is lost when nothing found is within this of it in both angles, rad.
LOST = math.radians(3.0)
SCATTERED = {
    "codebook": "random",
    "power_law": "equal",
    "rician_min": -30.0,
    "rician_max": -20.0,
}


def prepare(checkpoint: Path | None) -> Tools:
    """Tools of a checkpoint, or of the preset without a network."""
    if checkpoint is not None:
        return load_tools(checkpoint)
    return gather_tools(apply_profile(PRESETS["small"], "sound"))


def run_main(options: argparse.Namespace) -> Iterator[str]:
    """Table by K and SNR, and the figures."""
    tools = prepare(options.checkpoint)
    request = Request((0.0, 5.0, 10.0, 20.0), (1, 2), options.scenes, options.slow_scenes)
    table = evaluate(tools, request)
    yield describe_scenes(tools.config.scenario)
    yield ""
    yield from write_table(table)
    if options.figures is not None:
        plot_errors(table, options.figures)
        (batch, *_) = draw_scenes(tools.config.scenario, sources=2, scenes=1, seed=0)
        plot_spectra(tools, batch, options.figures)


def run_robust(options: argparse.Namespace) -> Iterator[str]:
    """One line for each case, K and method."""
    tools = prepare(options.checkpoint)
    lines = [("case", "K", "method", "phi/theta/r", "> 5 deg", "K right", "err/CRB")]
    for case, (change, snr) in CASES.items():
        scenario = replace(tools.config.scenario, **change)
        changed = replace(tools, config=replace(tools.config, scenario=scenario))
        request = Request((snr,), (1, 2), options.scenes, options.slow_scenes, FITS)
        for row in evaluate(changed, request).rows:
            figures = row.figures
            rates = (f"{100 * figures.outliers:.1f}", f"{100 * figures.right:.1f}")
            over = f"{row.over_bound:.3f}"
            median = write_median(figures.median)
            lines.append((case, str(row.sources), row.method, median, *rates, over))
    yield f"{options.scenes} scenes of each, ML {options.slow_scenes}"
    yield ""
    yield from align(lines)


def run_count(options: argparse.Namespace) -> Iterator[str]:
    """How often the network alone is right about K, over more scenes than the other parts have."""
    tools = prepare(options.checkpoint)
    if tools.model is None:
        yield "no --checkpoint was given, and only a network says K by itself"
        return
    methods = list_methods(tools, sources=1)
    lines = [("K", "dB", "K right")]
    scenes = 16 * options.scenes
    for sources in (1, 2):
        for snr in (5.0, 10.0, 20.0):
            world = replace(tools.config.scenario, snr_min=snr, snr_max=snr)
            batches = draw_scenes(world, sources=sources, scenes=scenes, seed=0)
            right = summarise(measure(methods["network"], batches)[0]).right
            error = (right * (1 - right) / scenes) ** 0.5
            cell = f"{100 * right:.1f} ± {100 * error:.1f}"
            lines.append((str(sources), f"{snr:g}", cell))
    yield f"{scenes} scenes of each"
    yield ""
    yield from align(lines)


def run_timing(options: argparse.Namespace) -> Iterator[str]:
    """Mean over SNR 0 to 20 dB, batches of 64."""
    tools = prepare(options.checkpoint)
    request = Request((0.0, 5.0, 10.0, 20.0), (1, 2), 128, 8, FITS)
    table = evaluate(tools, request)
    names = list(dict.fromkeys(row.method for row in table.rows))
    ms = {n: float(np.mean([row.ms for row in table.rows if row.method == n])) for n in names}
    slow = ms["ML, K known"]
    lines = [(name, f"{value:.2f}", f"{slow / value:.0f}") for name, value in ms.items()]
    yield f"{platform.machine()}, {torch.get_num_threads()} threads"
    yield ""
    yield from align([("method", "ms per scene", "times faster than ML, K known"), *lines])


def run_bound(options: argparse.Namespace) -> Iterator[str]:
    """Medians of sqrt(CRB) over sources of `full`, and how far other draws' medians lie.

    The bound of a scene scales with the noise: one draw at 5 dB gives the columns of all SNRs.
    """
    scenario = replace(PRESETS["full"].scenario, **SCATTERED)
    rng = np.random.default_rng(0)
    lines = [("K", "scenes", "-5 dB", "5 dB", "20 dB", "r of 64 scenes", "r of as many")]
    for sources in (1, 2, 3, 5):
        batches = draw_scenes(
            replace(scenario, snr_min=5.0, snr_max=5.0),
            sources=sources,
            scenes=max(3 * options.scenes // 2, 4 * options.scenes // sources),
            seed=1,
        )
        sigma = torch.cat([bound_batch(batch, scenario, sources=sources) for batch in batches])
        middle = sigma.flatten(0, 1).median(0).values
        cells = []
        for snr in (-5.0, 5.0, 20.0):
            phi, theta, r = (middle * 10 ** ((5.0 - snr) / 20.0)).tolist()
            cells.append(write_median((phi, theta, r)))
        spreads = [_spread_median(rng, sigma[..., 2].numpy(), size) for size in (64, len(sigma))]
        lines.append((str(sources), str(len(sigma)), *cells, *spreads))
    yield describe_scenes(scenario)
    yield ""
    yield from align(lines)


def _spread_median(rng: np.random.Generator, ranges: np.ndarray, size: int) -> str:
    """95 % of the medians of so many scenes, over the median of all; by drawing them again."""
    again = [np.median(ranges[rng.integers(0, len(ranges), size)]) for _ in range(400)]
    low, high = np.percentile(again, (2.5, 97.5)) / np.median(ranges) - 1
    return f"{100 * low:+.0f} to {100 * high:+.0f} %"


def run_full(options: argparse.Namespace) -> Iterator[str]:
    """Sources lost with many of them: with a network, without one, and from a perfect start."""
    config = apply_profile(PRESETS["full"], "sound")
    scenario = replace(config.scenario, codebook="random", power_law="equal", correlation_max=0.5)
    tools = gather_tools(replace(config, scenario=scenario))
    if options.full_checkpoint is not None:
        tools = load_tools(options.full_checkpoint)
    scenario = tools.config.scenario
    heads = ("K", "dB", "method", "lost", "K right", "phi/theta/r", "GOSPA", "err/CRB", "ms")
    lines = [heads]
    few = max(48, options.scenes // 4)
    for sources in (3, 5):
        for snr in (5.0, 15.0):
            # the hardest cell is where a network can earn its place
            scenes = options.scenes if (sources, snr) == (5, 5.0) else few
            world = replace(scenario, snr_min=snr, snr_max=snr)
            batches = draw_scenes(world, sources=sources, scenes=scenes, seed=0)
            sigma = np.concatenate([bound_batch(b, world, sources=sources) for b in batches])
            for name, method in _list_full(tools, sources).items():
                scores, seconds = measure(method, batches)
                figures = summarise(scores)
                cells = (_write_lost(scores, sources), f"{100 * figures.right:.1f}")
                tail = (f"{figures.gospa:.3f}", f"{compare_bound(scores, sigma):.3f}")
                ms = f"{1e3 * seconds / scenes:.0f}"
                median = write_median(figures.median)
                lines.append((str(sources), f"{snr:g}", name, *cells, median, *tail, ms))
    yield describe_scenes(scenario)
    yield f"{few} scenes of each, {options.scenes} of K = 5, 5 dB"
    yield ""
    yield from align(lines)


def _list_full(tools: Tools, sources: int) -> dict[str, Method]:
    """The fits, and one from the true places."""
    methods = list_methods(tools, sources=sources)
    wanted = ("network", *FITS[:4])
    chosen = {name: methods[name] for name in wanted if name in methods}

    def start_at_truth(batch: Batch) -> Answer:
        starts = place_points(batch.points[:, :sources])[:, None]
        found = fit_sources(lay_out_batch(batch, tools.config.scenario), starts, plan=tools.plan)
        return Answer(name_places(found.places), batch.count)

    return {**chosen, "truth + fit, K known": start_at_truth}


def _write_lost(scores: Scores, sources: int) -> str:
    """Percent of the true sources that nothing found is within 3 degrees of, and its error."""
    far = np.nan_to_num(scores.errors[:, :sources, :2], nan=np.inf).max(-1) > LOST
    share = far.mean()
    # scenes are what is drawn: sources of one are lost together
    error = far.mean(1).std() / len(far) ** 0.5
    return f"{100 * share:.1f} ± {100 * error:.1f}"


PARTS = {
    "main": run_main,
    "count": run_count,
    "robust": run_robust,
    "timing": run_timing,
    "bound": run_bound,
    "full": run_full,
}


def main() -> None:
    """Run the parts and print what is to stand in the docs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--full-checkpoint", type=Path, help="network of `full`")
    parser.add_argument("--scenes", type=int, default=256)
    parser.add_argument("--slow-scenes", type=int, default=96)
    parser.add_argument("--figures", type=Path, help="folder for the figures of `main`")
    options = parser.parse_args()
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown or not min(options.scenes, options.slow_scenes) > 0:
        parser.error(f"parts are {', '.join(PARTS)}, numbers of scenes at least 1")
    for part in options.parts or PARTS:
        print(f"## {part}\n")
        for line in PARTS[part](options):
            print(line, flush=True)
        print()


if __name__ == "__main__":
    main()
