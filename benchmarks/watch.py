"""What `nanhunt.watch` costs, over a loop that clips.

`python benchmarks/watch.py --threads 1` trains each model by a plain loop (zero_grad, forward,
backward, `clip_grad_norm_`, optimizer step, and the loss read for a log) and under watch,
interleaved, and prints medians of the processor time of a step, the median of the ratios of
neighbours, and the part of a step that watch counts as its own; that part holds the norms, which a
loop that clips computes as well.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import nanhunt
from nanhunt.loading import load


@dataclass(frozen=True, slots=True)
class Training:
    """A model and the closure that computes its loss."""

    model: nn.Module
    closure: Callable[[], Tensor]


def tiny() -> Training:
    """Three layers of 256 units, batch 128: about 2 ms per step on one free core."""
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    x = torch.randn(128, 64)
    return Training(model, lambda: model(x).square().mean())


def encoder() -> Training:
    """Four transformer layers with dropout, width 256, 8 sequences of 64 tokens."""
    layer = nn.TransformerEncoderLayer(256, 4, 512, batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    x = torch.randn(8, 64, 256)
    return Training(model, lambda: model(x).square().mean())


def convnet() -> Training:
    """Six convolutions with batch norm, 32 images of 32 x 32."""
    sizes = [(3, 32), *[(32, 32)] * 5]
    blocks = [
        m for i, o in sizes for m in (nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())
    ]
    model, x = nn.Sequential(*blocks), torch.randn(32, 3, 32, 32)
    return Training(model, lambda: model(x).square().mean())


def ris() -> Training:
    """The bundled sound system, small."""
    subject = load("ris:sound", options={"preset": "small"}).subject
    batch = subject.batch(0)
    return Training(
        subject.model, lambda: torch.stack(list(subject.call_loss(batch).values())).sum()
    )


WORK: Mapping[str, Callable[[], Training]] = {
    "tiny MLP": tiny,
    "encoder": encoder,
    "convnet": convnet,
    "ris small": ris,
}


def measure(training: Training, rounds: int, *, keeps: bool) -> dict[str, float]:
    """Medians over interleaved steps of one model, first three left out."""
    model, closure = training.model, training.closure
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    watch = nanhunt.watch(model, optimizer, clip=1.0, keep_previous=keeps)

    def plain() -> float:
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item()

    def watched() -> float:
        return watch.step(closure).loss or 0.0

    pairs: list[tuple[float, float]] = []
    for index in range(rounds + 3):
        order = (plain, watched) if index % 2 else (watched, plain)
        times = {}
        for work in order:
            start = time.process_time()
            work()
            times[work] = time.process_time() - start
        pairs.append((times[plain], times[watched]))
    own = [figures.inside / figures.seconds for figures in watch.figures[3:]]
    return {
        "plain, ms": 1e3 * statistics.median(a for a, _ in pairs[3:]),
        "watch, ms": 1e3 * statistics.median(b for _, b in pairs[3:]),
        "cost, %": 100 * (statistics.median(b / a for a, b in pairs[3:]) - 1),
        "own, %": 100 * statistics.median(own),
        "own, us": 1e6 * statistics.median(figures.inside for figures in watch.figures[3:]),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--work", nargs="*", choices=list(WORK), default=list(WORK))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--keep-previous", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows = {}
    for name in chosen.work:
        torch.manual_seed(0)
        rounds = chosen.rounds * (5 if name == "tiny MLP" else 1)
        rows[name] = measure(WORK[name](), rounds, keeps=chosen.keep_previous)
    print(pd.DataFrame(rows).T.round(2).to_string())


if __name__ == "__main__":
    main()
