"""The arguments of `watch`: each is refused with one sentence where it means nothing."""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nanhunt.errors import UsageError
from nanhunt.records import Figures, Report
from nanhunt.variants import variant

POLICIES = ("skip", "raise")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What is watched and how: the arguments of `watch`, checked."""

    model: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    scaler: Any
    schedulers: tuple[Any, ...]
    clip: float | None
    accumulate: int
    capsules: Path | None
    policy: Literal["skip", "raise"]
    stop_after: int | None
    keep_previous: bool
    subject: str
    variants: tuple[str, ...]
    measure_every: int
    log: Callable[[Figures], object] | None
    on_report: Callable[[Report], object] | None
    groups: Mapping[str, Iterable[str | nn.Parameter]]
    agree: Callable[[Tensor], Tensor] | None
    budget: float

    def __post_init__(self) -> None:
        _check_optimizers(self.model, self.optimizers)
        _check_scaler(self.scaler)
        for scheduler in self.schedulers:
            _check_scheduler(scheduler, self.optimizers)
        _check_closures(self)
        _check_numbers(self)
        _check_words(self)

    @property
    def live_scaler(self) -> Any:
        """The scaler, unless it is there but disabled."""
        return self.scaler if self.scaler is not None and self.scaler.is_enabled() else None

    @property
    def needs_closure(self) -> bool:
        """Whether the optimizer evaluates the loss by itself, as LBFGS does."""
        return any(map(needs_closure, self.optimizers))


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer cannot step without a closure."""
    return isinstance(optimizer, torch.optim.LBFGS)


def listed(value: Any) -> tuple[Any, ...]:
    """One thing, several or none, as a tuple."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _kind(value: Any) -> str:
    return "None" if value is None else f"an object of type {type(value).__name__}"


def _check_optimizers(model: Any, optimizers: Sequence[Any]) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError(f"watch takes a torch.nn.Module; got {_kind(model)}")
    if not optimizers:
        raise UsageError("watch takes the optimizer of the model, or a list of them; got none")
    own = {id(parameter) for parameter in model.parameters()}
    for optimizer in optimizers:
        if not all(hasattr(optimizer, name) for name in ("param_groups", "step", "zero_grad")):
            raise UsageError(f"watch takes a torch.optim.Optimizer; got {_kind(optimizer)}")
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(id(parameter) in own for parameter in held):
            raise UsageError(
                f"the optimizer {type(optimizer).__name__} steps none of the model's parameters: "
                f"of the {len(held)} that it holds 0 belong to this {type(model).__name__}; make "
                f"it from model.parameters()"
            )


def _check_scaler(scaler: Any) -> None:
    needed = ("scale", "unscale_", "step", "update", "get_scale", "is_enabled")
    if scaler is not None and not all(hasattr(scaler, name) for name in needed):
        raise UsageError(f"scaler is to be a torch.amp.GradScaler; got {_kind(scaler)}")


def _check_scheduler(scheduler: Any, optimizers: Sequence[Any]) -> None:
    if not callable(getattr(scheduler, "step", None)):
        raise UsageError(
            f"scheduler is to be one of torch.optim.lr_scheduler; got {_kind(scheduler)}"
        )
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise UsageError(
            "ReduceLROnPlateau is stepped with a metric, once per epoch: leave it out of watch and "
            "step it yourself"
        )
    driven = getattr(scheduler, "optimizer", None)
    if driven is not None and not any(driven is one for one in optimizers):
        raise UsageError(
            f"the scheduler {type(scheduler).__name__} drives another optimizer than the one given "
            f"to watch; make it from that one"
        )


def _check_closures(choices: Choices) -> None:
    if not choices.needs_closure:
        return
    if len(choices.optimizers) > 1:
        raise UsageError(
            f"an optimizer that evaluates the loss itself, as LBFGS, steps alone; got "
            f"{len(choices.optimizers)} optimizers: give each a watch of its own"
        )
    if choices.live_scaler is not None:
        raise UsageError("a GradScaler supports no optimizer that needs a closure, such as LBFGS")
    if choices.accumulate != 1:
        raise UsageError(
            f"accumulate={choices.accumulate} means nothing to LBFGS, which evaluates the whole "
            f"loss several times per step; add the micro-batches up inside the closure"
        )


def _check_numbers(choices: Choices) -> None:
    clip, stop_after = choices.clip, choices.stop_after
    if clip is not None and not (_is_number(clip) and 0 < clip < math.inf):
        raise UsageError(f"clip is the largest norm of all gradients, above 0; got {clip!r}")
    if not _is_whole(choices.accumulate, least=1):
        raise UsageError(
            f"accumulate is the number of micro-batches of a step, at least 1; "
            f"got {choices.accumulate!r}"
        )
    if stop_after is not None and not _is_whole(stop_after, least=1):
        raise UsageError(
            f"stop_after is a number of steps in a row, at least 1, or None; got {stop_after!r}"
        )
    if not _is_whole(choices.measure_every, least=0):
        raise UsageError(
            f"measure_every is a number of steps, 0 for never; got {choices.measure_every!r}"
        )
    if not (_is_number(choices.budget) and choices.budget >= 0):
        raise UsageError(
            f"budget is the seconds that trials of fixes may take, 0 for none; "
            f"got {choices.budget!r}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_words(choices: Choices) -> None:
    if choices.policy not in POLICIES:
        near = difflib.get_close_matches(str(choices.policy), POLICIES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"policy is 'skip' or 'raise'; got {choices.policy!r}{hint}")
    for name in choices.variants:
        variant(name)
    for name in ("log", "on_report", "agree"):
        value = getattr(choices, name)
        if value is not None and not callable(value):
            raise UsageError(f"{name} is to be a function; got {_kind(value)}")
    if not isinstance(choices.subject, str):
        raise UsageError(
            f"subject names a factory, as in 'pkg.mod:factory'; got {_kind(choices.subject)}"
        )
    if not isinstance(choices.groups, Mapping):
        raise UsageError(
            f"groups maps names to prefixes of parameter names; got {_kind(choices.groups)}"
        )
