"""What a healthy gate costs, as a ratio to the plain steps of the variants that it runs.

`python benchmarks/gate.py` interleaves, on several healthy subjects, the whole examination that
`nanhunt gate` makes of a case with the same steps taken plainly, and prints medians and their
ratio. A plain step is the forward, the loss and the backward in the precision of the variant and
nothing else: no state is put back, nothing is measured. It is taken in two manners:

- `same`: under the very modes of the variant, which is what a replay of it must run at least;
- `by hand`: as a program would be written for it, with `model.double()` or `torch.autocast`;
  FP16 on a CPU is emulated as the gate does, since a plain product there is 200 times slower.

Time is that of the process on the processor, so that other work on the machine does not count.
`--start-up` prints what comes once per command: the imports and the building of the subject.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from nanhunt.gate import Gated
from nanhunt.gating import examine
from nanhunt.interventions import HalfEmulation
from nanhunt.loading import load
from nanhunt.structure import map_tensors
from nanhunt.subject import Subject
from nanhunt.variants import above, beneath, cast_batch, variant

SUBJECTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "examples/gpt.py": ("examples/gpt.py:build", {}),
    "examples/resnet.py": ("examples/resnet.py:build", {}),
    "ris:sound tiny": ("ris:sound", {"preset": "tiny"}),
    "ris:sound small": ("ris:sound", {"preset": "small"}),
    "ris:sound full": ("ris:sound", {"preset": "full"}),
}
VARIANTS = ("native", "fp64", "fp32", "amp-bf16-net", "amp-fp16-net")
Step = Callable[[], object]


def built(name: str) -> Subject:
    """A fresh subject, the same each time."""
    spec, options = SUBJECTS[name]
    return Subject.of(load(spec, options=dict(options)).subject)


def backward(subject: Subject, batch: Any) -> None:
    """Forward, loss and backward; the optimizer where there is one."""
    for parameter in subject.parameters():
        parameter.grad = None
    value = subject.call_loss(batch)
    total = torch.stack([*value.values()]).sum() if isinstance(value, Mapping) else value
    total.backward()
    if subject.optimizer is not None:
        subject.optimizer.step()


def same(name: str, chosen: str) -> Step:
    """The plain step under the modes of a variant; the model is cast once."""
    subject, each = built(name), variant(chosen)
    batch, is_half = cast_batch(each, subject.batch(0)), each.precision is None

    def step() -> None:
        with (
            beneath(half=is_half) as execution,
            above(each, subject, execution),
            torch.enable_grad(),
        ):
            backward(subject, batch)
        torch.set_default_dtype(torch.float32)

    return step


def by_hand(name: str, chosen: str) -> Step | None:
    """The plain step as one would write it; None where the program cannot be cast by hand."""
    subject, each = built(name), variant(chosen)
    batch = subject.batch(0)
    if each.precision == "float64":
        subject.model.double()
        batch = map_tensors(batch, _doubled)
    plain = contextlib.nullcontext()
    dtype = getattr(torch, each.autocast) if each.autocast else None
    half = HalfEmulation() if each.autocast == "float16" else plain

    def step() -> None:
        with half, torch.autocast("cpu", dtype=dtype) if dtype else plain:
            backward(subject, batch)

    try:
        step()
    except RuntimeError:  # a loss that makes FP32 tensors of its own
        return None
    return step


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def gated(name: str, variants: Sequence[str]) -> Step:
    """The whole examination of a case."""
    subject = built(name)
    rule = replace(Gated(subject=name), variants=tuple(variants))

    def step() -> None:
        report = examine(subject, rule)
        if report.verdict != "healthy":
            raise SystemExit(f"{name} is not healthy: {report.headline}")

    return step


def seconds(step: Step) -> float:
    """Seconds of the processor that one call takes."""
    start = time.process_time()
    step()
    return time.process_time() - start


def measure(name: str, rounds: int) -> dict[str, float]:
    """Median milliseconds of the gate and of the plain steps, and their ratios."""
    steps: dict[str, Step] = {"gate": gated(name, VARIANTS)}
    steps |= {f"same {each}": same(name, each) for each in VARIANTS}
    hands = {f"hand {each}": by_hand(name, each) for each in VARIANTS}
    is_by_hand = all(hands.values())
    if is_by_hand:
        steps |= {key: step for key, step in hands.items() if step is not None}
    times: dict[str, list[float]] = {key: [] for key in steps}
    for _ in range(rounds + 1):
        for key, step in steps.items():
            times[key].append(seconds(step))
    medians = {key: 1e3 * statistics.median(values[1:]) for key, values in times.items()}
    plain = sum(medians[f"same {each}"] for each in VARIANTS)
    again = plain + medians["same native"]
    row = {"plain native, ms": medians["same native"], "5 plain, ms": plain}
    row |= {"gate, ms": medians["gate"], "gate / same": medians["gate"] / plain}
    row |= {"… native twice": medians["gate"] / again}
    hand = sum(medians[f"hand {each}"] for each in VARIANTS) if is_by_hand else float("nan")
    return {**row, "gate / by hand": medians["gate"] / hand}


def start_up(name: str) -> float:
    """Seconds of a process that imports what the gate needs and builds a subject."""
    spec, options = SUBJECTS[name]
    code = (
        "import sys, nanhunt.gating; from nanhunt.loading import load; load(sys.argv[1], options="
    )
    words = [sys.executable, "-c", f"{code}{options!r})", spec]
    start = time.perf_counter()
    subprocess.run(words, check=True)  # noqa: S603 - ourselves
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--subject", nargs="*", choices=list(SUBJECTS), default=list(SUBJECTS)[:4])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--start-up", action="store_true", help="seconds before the first step")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows = {}
    for name in chosen.subject:
        row = {"start-up, s": start_up(name)} if chosen.start_up else measure(name, chosen.rounds)
        rows[name] = row
    print(pd.DataFrame(rows).T.round(2).to_string())


if __name__ == "__main__":
    main()
