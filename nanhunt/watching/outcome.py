"""What one watched step did, as the training loop is told."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from nanhunt.records import Report, Why

Reason: TypeAlias = Why | Literal["accumulating"]

SENTENCES: Mapping[str, str] = {
    "": "the step was taken",
    "accumulating": "its gradients were added up; more micro-batches come before the step",
    "scaler": "gradients overflow at the loss scale: the scaler skips the step and lowers it",
    "nonfinite": "gradients are not finite",
    "loss": "the loss is not finite",
    "parameters": "parameters were not finite before the step",
    "ranks": "another process skips the step",
    "raised": "the step raised",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step did.

    Args:
        step: its number; micro-batches that are accumulated belong to one step.
        loss: the loss as the closure returned it, the mean of those of several micro-batches; None
            while they accumulate, which reads nothing off the device.
        norms: gradient norm of each group of parameters, unscaled and before clipping.
        norm: that of all gradients together.
        stepped: whether every optimizer stepped.
        why: why not, as a word; empty where it did. `str(outcome)` is a sentence.
        scale: the loss scale of the step; None without a scaler.
        clipped: the factor by which clipping scaled the gradients down; None where it did not.
        scheduled: whether the schedulers were stepped; None where there are none.
        report: of the culprit, where the step was hunted; the same one each time that it is met.
        capsule: the file that holds the step, where one was written.
        notes: sentences about what was put back.
    """

    step: int
    loss: float | None = None
    norms: Mapping[str, float] = field(default_factory=dict)
    norm: float | None = None
    stepped: bool = False
    why: Reason = ""
    scale: float | None = None
    clipped: float | None = None
    scheduled: bool | None = None
    report: Report | None = None
    capsule: Path | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"step {self.step}: {SENTENCES[self.why]}"
