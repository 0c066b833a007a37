"""What `nanhunt run` costs per training step, as a ratio to the plain step.

`python benchmarks/run.py` takes the same steps (zero_grad, forward, backward, AdamW) plainly, under
light and under full mode, in turn and in a new order each round, and prints the medians of the
ratios within a round, in processor time. Light mode does the same few things each step, so its
cost beside a short step says more than a small ratio beside a long one: it is printed as
microseconds too, measured where it is spent.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from nanhunt.launch.desk import Desk, Order
from nanhunt.launch.ledger import Ledger
from nanhunt.launch.sentry import Sentry

MODES = ("plain", "light", "full")


def tiny() -> tuple[nn.Module, Tensor]:
    """Three small layers: a step of about a millisecond."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)), torch.randn(256, 64)


def mlp() -> tuple[nn.Module, Tensor]:
    """60 linear layers of 64 units, batch 32: pure dispatch."""
    layers = [layer for _ in range(60) for layer in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(*layers), torch.randn(32, 64)


def encoder() -> tuple[nn.Module, Tensor]:
    """Four transformer layers, width 256, 16 sequences of 64 tokens."""
    layer = nn.TransformerEncoderLayer(256, 4, 512, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), torch.randn(16, 64, 256)


def convnet() -> tuple[nn.Module, Tensor]:
    """Six convolutions with batch norm, 32 images of 32 x 32."""
    sizes = [(3, 32), *[(32, 32)] * 5]
    blocks = [
        m for i, o in sizes for m in (nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())
    ]
    return nn.Sequential(*blocks), torch.randn(32, 3, 32, 32)


WORK: Mapping[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "tiny": tiny,
    "mlp": mlp,
    "encoder": encoder,
    "convnet": convnet,
}


def training_step(work: str) -> Callable[[], None]:
    """Build a model and return one step of its training."""
    torch.manual_seed(0)
    model, x = WORK[work]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


class Timed(Sentry):
    """A sentry that adds up the processor time which it spends itself in light mode."""

    inside = 0.0

    def _before_step(self, *args: Any) -> Any:
        start = time.process_time()
        returned = super()._before_step(*args)
        self.inside += time.process_time() - start
        return returned

    def _before_zero(self, *args: Any) -> None:
        start = time.process_time()
        super()._before_zero(*args)
        self.inside += time.process_time() - start


def block(mode: str, step: Callable[[], None], steps: int) -> tuple[float, float]:
    """Processor seconds of one step under a mode, and those of them inside the sentry."""
    order = Order(mode="full" if mode == "full" else "light", out=Path("unused"))
    sentry = Timed(order, Desk(order), Ledger())
    if mode != "plain":
        sentry.attach()
    try:
        step()  # the modules are looked for, the compiler is imported
        sentry.inside = 0.0
        start = time.process_time()
        for _ in range(steps):
            step()
        return (time.process_time() - start) / steps, sentry.inside / steps
    finally:
        sentry.leave()


def measure(work: str, rounds: int, seconds: float) -> dict[str, float]:
    """Medians over rounds in which every mode takes its turn."""
    step = training_step(work)
    plain, _ = block("plain", step, 3)
    steps = max(3, round(seconds / plain))
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    inside = []
    for _ in range(rounds):
        for mode in random.sample(MODES, len(MODES)):
            taken, own = block(mode, step, steps)
            times[mode].append(taken)
            inside += [own] if mode == "light" else []
    ratios = {
        mode: statistics.median(a / b for a, b in zip(times[mode], times["plain"], strict=True))
        for mode in ("light", "full")
    }
    plain, own = statistics.median(times["plain"]), statistics.median(inside)
    return {
        "plain, ms": 1e3 * plain,
        "light": ratios["light"],
        "of which inside, us": 1e6 * own,
        "inside / plain, %": 100 * own / plain,
        "full": ratios["full"],
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each mode in a round")
    parser.add_argument("--work", nargs="*", choices=list(WORK), default=list(WORK))
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    random.seed(0)
    rows = {work: measure(work, chosen.rounds, chosen.seconds) for work in chosen.work}
    print(pd.DataFrame(rows).T.round(3).to_string())


if __name__ == "__main__":
    main()
