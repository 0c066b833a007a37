"""What recording a step costs, as a ratio to the plain step.

`python benchmarks/overhead.py` interleaves the plain step, `detect_anomaly`, an empty dispatch mode
and the recorder, takes medians, and prints a table. Ratios are what counts: the machine's own speed
and its noise divide out.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nanhunt.loading import load
from nanhunt.recorder import Recorder
from nanhunt.subject import Subject


class Empty(TorchDispatchMode):
    """Does nothing but pass each op on: the least that any such tool can cost."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the op."""
        del types
        return func(*args, **(kwargs or {}))


def mlp() -> Callable[[], Tensor]:
    """60 linear layers of 64 units, batch 32: pure dispatch."""
    layers = [layer for _ in range(60) for layer in (nn.Linear(64, 64), nn.ReLU())]
    model, x = nn.Sequential(*layers), torch.randn(32, 64)
    return lambda: model(x).square().mean()


def encoder() -> Callable[[], Tensor]:
    """Four transformer layers, width 256, 32 sequences of 64 tokens."""
    layer = nn.TransformerEncoderLayer(256, 4, 512, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), torch.randn(32, 64, 256)
    return lambda: model(x).square().mean()


def convnet() -> Callable[[], Tensor]:
    """Six convolutions with batch norm, 32 images of 32 x 32."""
    sizes = [(3, 32), *[(32, 32)] * 5]
    blocks = [
        m for i, o in sizes for m in (nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())
    ]
    model, x = nn.Sequential(*blocks), torch.randn(32, 3, 32, 32)
    return lambda: model(x).square().mean()


def ris(preset: str) -> Callable[[], Tensor]:
    """The bundled system without the term that fails."""
    subject: Subject = load("ris:incident", options={"preset": preset}).subject
    subject.reweighted("lam_align", 0.0)
    batch = subject.batch(0)
    return lambda: torch.stack(list(subject.call_loss(batch).values())).sum()


WORK: Mapping[str, Callable[[], Callable[[], Tensor]]] = {
    "mlp": mlp,
    "encoder": encoder,
    "convnet": convnet,
    "ris small": lambda: ris("small"),
}


def recording() -> AbstractContextManager[Any]:
    """A fresh recorder, as each replay has one."""
    return Recorder().recording()


MODES: Mapping[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": nullcontext,
    "empty mode": Empty,
    "recorder": recording,
    "detect_anomaly": lambda: torch.autograd.detect_anomaly(check_nan=True),
}


def measure(step: Callable[[], Tensor], rounds: int) -> dict[str, float]:
    """Median seconds of a forward and backward under each mode, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in MODES}
    for _ in range(rounds + 1):
        for name, mode in MODES.items():
            start = time.perf_counter()
            with mode():
                step().backward()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--work", nargs="*", choices=list(WORK), default=list(WORK))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows = {}
    for name in chosen.work:
        torch.manual_seed(0)
        seconds = measure(WORK[name](), chosen.rounds)
        ratios = {mode: value / seconds["plain"] for mode, value in seconds.items()}
        rows[name] = {"plain, ms": 1e3 * seconds["plain"], **ratios}
    print(pd.DataFrame(rows).T.drop(columns="plain").round(2).to_string())


if __name__ == "__main__":
    import warnings

    warnings.filterwarnings("ignore", message="Anomaly Detection")
    main()
