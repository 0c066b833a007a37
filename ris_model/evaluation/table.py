"""Table: the errors of every method by K and SNR, beside the bound, with the time they take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from ris_model.config import Scenario
from ris_model.data import Batch, draw_batch
from ris_model.estimate.bound import bound_batch
from ris_model.evaluation.methods import Method, Tools, list_methods
from ris_model.metrics import Scores, Summary, join, score, summarise

# Median of |x| of a normal x of variance 1: what an efficient estimate has over sqrt(CRB).
NORMAL_MEDIAN = 0.6745
BATCH = 64
# Methods that are given fewer scenes, because each takes so long.
SLOW = (
    "ML, K known",
    "MUSIC, K known",
    "MUSIC on ALS, K known",
    "MVDR, K known",
    "MUSIC on R_true",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One method on the scenes of one K and SNR."""

    method: str
    sources: int
    snr_db: float
    figures: Summary
    over_bound: float  # median of |angle error| / sqrt(CRB); an efficient estimate has 0.674
    ms: float  # of processor time per scene, batches of 64


@dataclass(frozen=True, slots=True)
class Bound:
    """What scenes of one K and SNR allow: 0.674 of the median of sqrt(CRB), rad, rad, m."""

    sources: int
    snr_db: float
    sigma: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows and bounds of an evaluation."""

    rows: tuple[Row, ...]
    bounds: tuple[Bound, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """What is evaluated."""

    snrs: tuple[float, ...]  # dB
    sources: tuple[int, ...]
    scenes: int = 256  # of each K and SNR
    slow_scenes: int = 32  # of those for the slow methods
    methods: tuple[str, ...] = ()  # all without
    seed: int = 0


def evaluate(
    tools: Tools,
    request: Request,
    *,
    tell: Callable[[str], None] = lambda _: None,
) -> Table:
    """Run every method on the same scenes of the test split.

    Args:
        tools: of the model.
        request: what is evaluated.
        tell: is told what is begun.
    """
    rows, bounds = [], []
    for sources in request.sources:
        methods = list_methods(tools, sources=sources)
        chosen = {n: m for n, m in methods.items() if n in (request.methods or methods)}
        for snr in request.snrs:
            tell(f"K = {sources}, {snr:g} dB ...")
            scenario = replace(tools.config.scenario, snr_min=snr, snr_max=snr)
            batches = draw_scenes(
                scenario, sources=sources, scenes=request.scenes, seed=request.seed
            )
            sigma = [bound_batch(b, scenario, sources=sources).numpy() for b in batches]
            middle = NORMAL_MEDIAN * np.median(np.concatenate(sigma).reshape(-1, 3), 0)
            bounds.append(Bound(sources, snr, (middle[0], middle[1], middle[2])))
            for name, method in chosen.items():
                limit = request.slow_scenes if name in SLOW else request.scenes
                some = list(_take(batches, limit))
                if not some:
                    continue
                scores, seconds = measure(method, some)
                over = compare_bound(scores, np.concatenate(sigma)[: len(scores.count)])
                ms = 1e3 * seconds / len(scores.count)
                rows.append(Row(name, sources, snr, summarise(scores), over, ms))
    return Table(tuple(rows), tuple(bounds))


def draw_scenes(scenario: Scenario, *, sources: int, scenes: int, seed: int) -> list[Batch]:
    """Draw test scenes that have K sources, in batches of 64."""
    found: list[Batch] = []
    have, index = 0, 0
    while have < scenes:
        drawn = draw_batch(scenario, seed=seed, split="test", index=index, size=4 * BATCH)
        chosen = (drawn.count == sources).nonzero()[: scenes - have, 0]
        found.append(pick_scenes(drawn, chosen))
        have, index = have + len(chosen), index + 1
    names = [f.name for f in fields(Batch)]
    whole = Batch(**{n: torch.cat([getattr(b, n) for b in found]) for n in names})
    return [pick_scenes(whole, i) for i in torch.arange(scenes).split(BATCH)]


def pick_scenes(batch: Batch, index: torch.Tensor) -> Batch:
    """Return the scenes of an index."""
    return Batch(**{f.name: getattr(batch, f.name)[index] for f in fields(batch)})


def measure(method: Method, batches: Iterable[Batch]) -> tuple[Scores, float]:
    """Scores of a method, and the seconds of processor time that it took.

    Of all threads together: what else the machine does has less of a say in it.
    """
    parts, seconds = [], 0.0
    with torch.inference_mode():
        for batch in batches:
            begin = time.process_time()
            answer = method(batch)
            seconds += time.process_time() - begin
            parts.append(
                score(
                    batch.points,
                    answer.points,
                    count=batch.count,
                    found_count=answer.count,
                    snr_db=batch.snr_db,
                )
            )
    return join(parts), seconds


def compare_bound(scores: Scores, sigma: np.ndarray) -> float:
    """Median over matched sources of |angle error| / sqrt(CRB), both angles together."""
    ratio = scores.errors[:, : sigma.shape[1], :2] / sigma[..., :2]
    ratio = ratio[np.isfinite(ratio)]
    return float(np.median(ratio)) if len(ratio) else math.nan


def _take(batches: list[Batch], limit: int) -> Iterator[Batch]:
    """The first scenes of batches."""
    for batch in batches:
        if limit <= 0:
            return
        some = min(limit, batch.samples)
        yield batch if some == batch.samples else pick_scenes(batch, torch.arange(some))
        limit -= some
