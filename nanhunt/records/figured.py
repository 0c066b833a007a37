"""The figures of one watched training step: small numbers for a log, none of them ever NaN."""

from dataclasses import dataclass
from typing import Literal

SANITISED = "gradients sanitised before the check"
Why = Literal["", "scaler", "nonfinite", "loss", "parameters", "ranks", "raised"]


@dataclass(frozen=True, slots=True)
class Figures:
    """What one step of a training did, as cheap to keep as it is to read.

    `step` counts the calls that ended in a decision, from 0. `loss` is None where it was not
    finite, and so is a norm: NaN never stands in a log. `stepped` says that the optimizer really
    stepped, and `why` why it did not: `"scaler"` is an overflow that a `GradScaler` skips as it
    should, `"nonfinite"` gradients and `"loss"` a loss that are not finite, `"parameters"` a
    parameter that was not finite before the step, `"ranks"` that another process skips, and
    `"raised"` that the step raised.

    `norms` are the gradient norms of the groups of parameters, unscaled and before clipping;
    `nonfinite` counts the gradients (tensors) that are not finite. `scale` is the loss scale of
    this step, `rates` are the learning rates, `clipped` is the factor by which the gradients were
    scaled down (None: they were not). `updates` are ‖Δθ‖/‖θ‖ of the groups in the steps in which
    that was measured. `scheduled` says whether the scheduler was stepped (None: there is none).
    `seconds` is the time of the step and `inside` what of it was spent in nanhunt. `notes` are
    sentences; `SANITISED` is one of them. `validated` says that a validation loss was told after
    this step, and `validation` is that loss (None: none was told, or it was not finite).
    """

    step: int
    loss: float | None
    stepped: bool
    why: Why
    norms: tuple[tuple[str, float | None], ...]
    nonfinite: int
    scale: float | None = None
    rates: tuple[float, ...] = ()
    clipped: float | None = None
    updates: tuple[tuple[str, float], ...] = ()
    scheduled: bool | None = None
    seconds: float = 0.0
    inside: float = 0.0
    notes: tuple[str, ...] = ()
    validated: bool = False
    validation: float | None = None
