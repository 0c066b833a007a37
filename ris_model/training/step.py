"""Step: one safe training step. Gradients are checked as they are, never cleaned first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

Reason = Literal[
    "",
    "loss not finite",
    "gradients not finite",
    "gradients vanished",
    "another process skips",
]

# Below this norm of all gradients together the loss does not reach the parameters.
_LEAST_NORM = 1e-12


class Trainable(Protocol):
    """What a step needs; `subject.Subject` is one."""

    @property
    def model(self) -> nn.Module:
        """Whose parameters are trained."""

    @property
    def loss_fn(self) -> Callable[[nn.Module, Any], dict[str, torch.Tensor]]:
        """Weighted terms by name; their sum is the loss."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Stepped when everything is finite."""

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """Scales the loss where the network runs in FP16."""

    @property
    def scheduler(self) -> torch.optim.lr_scheduler.LRScheduler | None:
        """Follows the steps that happened."""

    @property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Name -> submodules of the model, measured together."""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What one step did; norms are those of the true gradients, before clipping."""

    loss: float
    terms: dict[str, float]  # weighted
    norms: dict[str, float]  # gradient norm per group
    stepped: bool
    scale: float | None  # of the loss during the step; None without a scaler
    found_inf: bool  # some gradient entry was not finite
    reason: Reason  # why no step was made


def safe_step(
    subject: Trainable,
    batch: Any,
    *,
    clip: float = 1.0,
    agree: Callable[[bool], bool] | None = None,
    through: nn.Module | None = None,
) -> StepOutcome:
    """Make one training step, or skip it and say why.

    Forward and loss as the subject composes them, backward of the scaled loss, unscale once, norm
    of each group's gradients as they are, then: all finite -> clip, step, scaler, scheduler; else
    drop the gradients and let the scaler back off, parameters, optimizer and scheduler untouched.

    Args:
        subject: model, loss and what belongs to a step.
        batch: what its `loss_fn` takes.
        clip: largest norm of all gradients together.
        agree: told whether this process skips, answers whether some process does; all of them
            then skip together.
        through: a wrapper of the model that the forward goes through; the model itself without.

    Returns:
        What happened.
    """
    optimizer, scaler = subject.optimizer, subject.scaler
    optimizer.zero_grad(set_to_none=True)
    terms = subject.loss_fn(subject.model if through is None else through, batch)
    total = torch.stack(list(terms.values())).sum()
    (total if scaler is None else scaler.scale(total)).backward()
    if scaler is not None:
        scaler.unscale_(optimizer)
    scale = None if scaler is None else float(scaler.get_scale())
    norms = measure_groups(subject)
    gradients = list(_list_gradients(optimizer))
    norm = get_total_norm(gradients)
    loss = total.item()
    reason = _judge(loss, norms, norm.item())
    found_inf = not all(gradient.isfinite().all() for gradient in gradients) if reason else False
    if agree is not None and agree(bool(reason)):
        reason = reason or "another process skips"
    if not reason:
        clip_grads_with_norm_(_list_parameters(optimizer), clip, norm)
        optimizer.step() if scaler is None else scaler.step(optimizer)
        if subject.scheduler is not None:
            subject.scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    if scaler is not None and gradients:
        scaler.update()
    return StepOutcome(
        loss=loss,
        terms={name: term.item() for name, term in terms.items()},
        norms=norms,
        stepped=not reason,
        scale=scale,
        found_inf=found_inf,
        reason=reason,
    )


def measure_groups(subject: Trainable) -> dict[str, float]:
    """Norm of the gradients of each group, as they are; 0 where there are none."""
    norms = {}
    for group, prefixes in subject.groups.items():
        modules = [subject.model.get_submodule(prefix) for prefix in prefixes]
        parameters = [parameter for module in modules for parameter in module.parameters()]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norms[group] = get_total_norm(gradients).item()
    return norms


def write_log(outcome: StepOutcome, weights: Mapping[str, float]) -> Iterator[str]:
    """Write the lines of a training log about one step.

    Args:
        outcome: the step.
        weights: of the loss terms, as the live objective holds them.
    """
    weight = float(weights.get("lam_subspace_align", 0.0))
    state = "ENABLED" if weight else "DISABLED"
    yield f"[LOSS DEBUG] Subspace align: {state} (weight={weight})"
    finite = "finite" if math.isfinite(outcome.loss) else "not finite"
    yield f"[DEBUG] Loss is {finite}: {outcome.loss:.6f}"
    shown = " ".join(f"{group}={norm:.3e}" for group, norm in outcome.norms.items())
    yield f"[GRAD] {shown} ok={all(map(math.isfinite, outcome.norms.values()))}"
    if outcome.scale is not None:
        yield f"[AMP] scale={outcome.scale:g} found_inf={int(outcome.found_inf)}"
    if outcome.reason == "gradients not finite":
        yield "[STEP] Non-finite gradients detected, skipping step and zeroing grads"
    elif outcome.reason:
        yield f"[STEP] {outcome.reason.capitalize()}, skipping step and zeroing grads"


def _judge(loss: float, norms: Mapping[str, float], norm: float) -> Reason:
    """Whether a step may be made: empty when it may."""
    if not math.isfinite(loss):
        return "loss not finite"
    if not all(map(math.isfinite, (norm, *norms.values()))):
        return "gradients not finite"
    return "" if norm > _LEAST_NORM else "gradients vanished"


def _list_parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Every parameter that the optimizer steps."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _list_gradients(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """The gradients that exist."""
    return (p.grad for p in _list_parameters(optimizer) if p.grad is not None)
