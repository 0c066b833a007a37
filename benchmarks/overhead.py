"""What recording a step costs, as a ratio to the plain step.

`python benchmarks/overhead.py` interleaves the plain step, an empty dispatch mode, the recorder,
`nanhunt.detect`, `detect_anomaly`, torch's `DebugMode` and plain module hooks, takes medians, and
prints a table of ratios: the machine's own speed and its noise divide out. Time is the CPU time of
the process, which others on the machine disturb less. Gradients are cleared before each step, as a
training loop and a replay do; `mlp adding` is the MLP whose gradients add up. `--memory` runs each
in a process of its own and compares the peaks of resident memory instead.
"""

import argparse
import contextlib
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nanhunt import detect
from nanhunt.loading import load
from nanhunt.recorder import Recorder
from nanhunt.subject import Subject


@dataclass(frozen=True, slots=True)
class Work:
    """A step, and the parameters whose gradients are cleared before it."""

    step: Callable[[], Tensor]
    cleared: tuple[nn.Parameter, ...] = ()

    def prepare(self) -> None:
        """Clear the gradients."""
        for parameter in self.cleared:
            parameter.grad = None


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


def mlp(*, is_adding: bool = False) -> Work:
    """60 linear layers of 64 units, batch 32: pure dispatch."""
    layers = [layer for _ in range(60) for layer in (nn.Linear(64, 64), nn.ReLU())]
    model, x = nn.Sequential(*layers), torch.randn(32, 64)
    cleared = () if is_adding else tuple(model.parameters())
    return Work(lambda: model(x).square().mean(), cleared)


def encoder() -> Work:
    """Four transformer layers, width 256, 32 sequences of 64 tokens."""
    layer = nn.TransformerEncoderLayer(256, 4, 512, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), torch.randn(32, 64, 256)
    return Work(lambda: model(x).square().mean(), tuple(model.parameters()))


def convnet() -> Work:
    """Six convolutions with batch norm, 32 images of 32 x 32."""
    sizes = [(3, 32), *[(32, 32)] * 5]
    blocks = [
        m for i, o in sizes for m in (nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())
    ]
    model, x = nn.Sequential(*blocks), torch.randn(32, 3, 32, 32)
    return Work(lambda: model(x).square().mean(), tuple(model.parameters()))


def algebra() -> Work:
    """Complex eigenvalues, a solve and an inverse of 16 Hermitian matrices of 64 x 64."""
    factor = nn.Parameter(torch.randn(16, 64, 64, dtype=torch.complex64))

    def step() -> Tensor:
        r = factor @ factor.mH / 64 + 0.1 * torch.eye(64)
        return torch.linalg.eigvalsh(r).log().sum() + torch.linalg.solve(r, factor).abs().mean()

    return Work(step, (factor,))


def ris(preset: str) -> Work:
    """The bundled system without the term that fails."""
    subject: Subject = load("ris:incident", options={"preset": preset}).subject
    subject.reweighted("lam_align", 0.0)
    batch = subject.batch(0)
    parameters = tuple(subject.model.parameters())
    return Work(lambda: torch.stack(list(subject.call_loss(batch).values())).sum(), parameters)


WORK: Mapping[str, Callable[[], Work]] = {
    "mlp": mlp,
    "mlp adding": lambda: mlp(is_adding=True),
    "encoder": encoder,
    "convnet": convnet,
    "algebra": algebra,
    "ris small": lambda: ris("small"),
    "ris full": lambda: ris("full"),
}


def recording() -> AbstractContextManager[Any]:
    """A fresh recorder, as each replay has one."""
    return Recorder().recording()


@contextlib.contextmanager
def hooked() -> Iterator[None]:
    """Hooks on every module that look at each output: what module-level detectors do."""

    def look(_module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            output.isfinite().all().item()

    handle = nn.modules.module.register_module_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


def debug_mode() -> AbstractContextManager[Any]:
    """Torch's own recorder of ops."""
    from torch.utils._debug_mode import DebugMode

    return DebugMode()


MODES: Mapping[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": nullcontext,
    "empty mode": Empty,
    "recorder": recording,
    "detect": detect,
    "detect_anomaly": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "DebugMode": debug_mode,
    "module hooks": hooked,
}


def measure(work: Work, rounds: int) -> dict[str, float]:
    """Median CPU seconds of a forward and backward under each mode, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in MODES}
    for _ in range(rounds + 1):
        for name, mode in MODES.items():
            work.prepare()
            start = time.process_time()
            with mode():
                work.step().backward()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def peak_memory(name: str, mode: str) -> float:
    """Peak resident memory, MiB, of a process that takes three steps under one mode."""
    words = [sys.executable, __file__, "--work", name, "--only", mode]
    ran = subprocess.run(words, capture_output=True, text=True, check=True)  # noqa: S603 - ourselves
    return float(ran.stdout)


def print_peak(name: str, mode: str) -> None:
    """Take the steps and print the peak; run in a process of its own."""
    work = WORK[name]()
    for _ in range(3):
        work.prepare()
        with MODES[mode]():
            work.step().backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--work", nargs="*", choices=list(WORK), default=list(WORK))
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--only", choices=list(MODES), help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.only:
        print_peak(chosen.work[0], chosen.only)
        return
    unit = "MiB" if chosen.memory else "ms"
    rows = {}
    for name in chosen.work:
        torch.manual_seed(0)
        if chosen.memory:
            cost = {mode: peak_memory(name, mode) for mode in MODES}
        else:
            cost = {mode: 1e3 * t for mode, t in measure(WORK[name](), chosen.rounds).items()}
        ratios = {mode: value / cost["plain"] for mode, value in cost.items()}
        rows[name] = {f"plain, {unit}": cost["plain"], **ratios}
    print(pd.DataFrame(rows).T.drop(columns="plain").round(2).to_string())


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="Anomaly Detection")
    main()
