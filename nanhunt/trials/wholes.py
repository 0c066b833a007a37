"""Changes of the step as a whole: the batch, the loss scale, the optimizer, the state."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nanhunt.records import Finding
from nanhunt.replay import has_scaler
from nanhunt.structure import count_samples, map_tensors, named_tensors
from nanhunt.subject import Subject
from nanhunt.trials.bench import Candidate

_SCALES = (-4, -8, -12)  # powers of 2
_OPTIMIZER_EPS = {"float16": (1e-4, 1e-3), "bfloat16": (1e-6, 1e-4)}
_RATES = (0.1, 0.01, 0.001)


def of_step(finding: Finding, subject: Subject, batch: Any) -> Iterator[Candidate]:
    """The changes of the whole step that may help against a finding."""
    if finding.phase == "data":
        yield from _of_data(finding, subject, batch)
    if finding.phase == "optimizer":
        yield from _of_optimizer(finding, subject)
    if finding.phase == "backward" and finding.dtype in ("float16", "bfloat16"):
        yield from _of_scale(subject)


def _of_scale(subject: Subject) -> Iterator[Candidate]:
    if subject.train_step is not None:
        return  # whether it scales its loss is its own affair
    for power in _SCALES:
        # A culprit has failed at every scale of its scaler from 1 up.
        own = f"a loss scale of 2^{power}, below that of the scaler"
        plain = f"the loss times 2^{power}, the gradients divided by it again"
        told = own if has_scaler(subject) else plain
        yield Candidate("smaller_loss_scale", told, scale=2.0**power)


def _of_optimizer(finding: Finding, subject: Subject) -> Iterator[Candidate]:
    groups = subject.optimizer.param_groups if subject.optimizer is not None else []
    if any("eps" in group for group in groups):
        for eps in _OPTIMIZER_EPS.get(finding.dtype, (1e-8, 1e-6)):
            told = f"eps of the optimizer: {groups[0].get('eps')} → {eps:g}"
            yield Candidate("optimizer_eps", told, applied=_Setting("eps", eps))
    for factor in _RATES if groups else ():
        told = f"learning rate {float(groups[0]['lr']):g} → {float(groups[0]['lr']) * factor:g}"
        yield Candidate("smaller_learning_rate", told, applied=_Setting("lr", factor, times=True))


class _Setting:
    """Sets an option of the optimizer in every group; the replay puts the groups back."""

    def __init__(self, option: str, value: float, *, times: bool = False) -> None:
        self._option, self._value, self._times = option, value, times

    @contextlib.contextmanager
    def __call__(self, subject: Subject) -> Iterator[None]:
        for group in subject.optimizer.param_groups if subject.optimizer is not None else ():
            if self._option in group:
                factor = group[self._option] if self._times else 1.0
                group[self._option] = factor * self._value
        yield


def _of_data(finding: Finding, subject: Subject, batch: Any) -> Iterator[Candidate]:
    kind, _, name = (finding.where or "").partition(":")
    if kind in ("param", "buffer"):
        owner, _, _ = name.rpartition(".")
        module = subject.model.get_submodule(owner)
        if any(hasattr(module, reset) for reset in _RESETS):
            told = f"{owner or 'the model'} initialised anew, as its class does it"
            yield Candidate("initialise", told, applied=_Initialising(owner))
        told = f"the non-finite elements of {name} set to 0"
        yield Candidate("initialise", told, applied=_Zeroing(name))
        return
    kept = _finite_samples(batch)
    if kept is None:
        told = "the non-finite numbers of the batch set to 0"
        yield Candidate("validate_batch", told, batch=map_tensors(batch, _cleaned))
    else:
        part, left, count = kept
        told = f"without the {count - left} of {count} samples that hold it"
        yield Candidate("validate_batch", told, batch=part)


_RESETS = ("reset_running_stats", "reset_parameters")


class _Initialising:
    def __init__(self, owner: str) -> None:
        self._owner = owner

    @contextlib.contextmanager
    def __call__(self, subject: Subject) -> Iterator[None]:
        module: Any = subject.model.get_submodule(self._owner)
        with torch.no_grad():
            next(getattr(module, name) for name in _RESETS if hasattr(module, name))()
        yield


class _Zeroing:
    def __init__(self, name: str) -> None:
        self._name = name

    @contextlib.contextmanager
    def __call__(self, subject: Subject) -> Iterator[None]:
        owner, _, name = self._name.rpartition(".")
        tensor: Tensor | nn.Parameter = getattr(subject.model.get_submodule(owner), name)
        with torch.no_grad():
            tensor.nan_to_num_(0.0, 0.0, 0.0)
        yield


def _cleaned(tensor: Tensor) -> Tensor:
    return torch.nan_to_num(tensor, 0.0, 0.0, 0.0) if tensor.is_floating_point() else tensor


def _finite_samples(batch: Any) -> tuple[Any, int, int] | None:
    """The samples of a batch without a non-finite number, how many they are, and of how many."""
    count = count_samples(batch)
    if count is None:
        return None
    keep = torch.ones(count, dtype=torch.bool)
    for _, tensor in named_tensors(batch):
        if tensor.dim() and tensor.shape[0] == count and tensor.is_floating_point():
            keep &= torch.isfinite(tensor.detach()).reshape(count, -1).all(1).cpu()
    left = int(keep.sum())
    if left in (0, count):
        return None

    def cut(tensor: Tensor) -> Tensor:
        is_batched = tensor.dim() and tensor.shape[0] == count
        return tensor[keep.to(tensor.device)] if is_batched else tensor

    return map_tensors(batch, cut), left, count
