"""The verdict on a step: may it be taken, and if not, why not."""

import math
from collections.abc import Sequence

import torch

from nanhunt.measurement import bad_among
from nanhunt.records import Why
from nanhunt.watching.held import Held
from nanhunt.watching.pulse import Pulse

# As many halvings lead from the first scale of a GradScaler, 65536, to 1.
OVERFLOWS = 16


def judge(pulse: Pulse, *, is_scaled: bool, overflows: int) -> Why:
    """Why a step is not to be taken; empty where it is.

    Args:
        pulse: what was read of it.
        is_scaled: whether a scaler will look at the gradients.
        overflows: how many steps in a row it has skipped before this one.
    """
    if pulse.is_finite:
        return "ranks" if pulse.alarm else ""
    if not all(map(math.isfinite, pulse.losses)):
        return "loss"
    can_be_lowered = is_scaled and pulse.scale is not None and 1.0 < pulse.scale < math.inf
    return "scaler" if can_be_lowered and overflows < OVERFLOWS else "nonfinite"


@torch.no_grad()
def bad_parameters(held: Held) -> list[int]:
    """Positions of the parameters that are not finite."""
    return bad_among(held.parameters)


def tell_seen(why: Why, pulse: Pulse, step: int) -> str:
    """What was not finite in training, one sentence."""
    bad, total = len(pulse.bad), len(pulse.norms)
    if why == "loss":
        loss = next(value for value in pulse.losses if not math.isfinite(value))
        return f"at step {step} the loss is {loss}"
    scale = f" at loss scale {pulse.scale:g}" if pulse.scale is not None else ""
    return f"at step {step} {bad} of {total} gradients are not finite{scale}"


def tell_parameters(held: Held, bad: Sequence[int], step: int, before: int | None) -> str:
    """Which parameters were not finite before a step, and which step left them so."""
    names = ", ".join(held.names[i] for i in bad[:3]) + (", …" if len(bad) > 3 else "")
    made = (
        "before the first watched step" if before is None else f"by the optimizer in step {before}"
    )
    return (
        f"at step {step} {len(bad)} of {len(held.parameters)} parameters are not finite ({names}); "
        f"they were made so {made}"
    )
