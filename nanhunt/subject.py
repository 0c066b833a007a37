"""What is examined: a model, its batches and its loss, and how to find them by name.

The contract is a shape, not a class: any object with the attributes of `Subject` is one, so that a
package can offer its training step for examination without depending on nanhunt.
"""

import dataclasses
import importlib
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nanhunt.errors import NanhuntError, SubjectError, UsageError
from nanhunt.generators import Generators, seed_generators, set_generators
from nanhunt.structure import map_tensors

Weights: TypeAlias = Mapping[str, float] | Callable[[], Mapping[str, float]]
TrainStep: TypeAlias = Callable[..., Iterable[tuple[str, Tensor]]]


@dataclass(frozen=True, slots=True)
class Subject:
    """One training step that can be repeated.

    Args:
        model: the module whose parameters are trained.
        batches: `batches(index) -> batch`, or a sequence of batches. A tuple batch is splatted,
            `loss_fn(model, *batch)`; anything else is passed as one argument.
        loss_fn: returns a scalar tensor, or a mapping of named terms whose sum is the loss (or
            whose key `"loss"` is).
        name: shown in reports.
        seed: under which the random generators stand when a replay starts.
        optimizer: stepped at the end of a replay whose gradients are finite; restored afterwards.
        scaler: a `torch.amp.GradScaler`; its scale is used as training would use it.
        scheduler: stepped after each of several steps that the optimizer took; restored
            afterwards. A replay of one step does not step it.
        train_step: the whole step where it is not zero_grad, loss, backward, optimizer step: a
            generator function `train_step(model, batch, loss_fn, optimizer, scaler, step)` that
            yields `("loss", loss)` before the backward, `("grads", loss)` after it and
            `("step", loss)` once the parameters have changed, each as often as it comes there.
        weights: the weights of the loss terms *as the live objective holds them*; give a function
            where the mapping does not follow `reweight`.
        configured: the weights as the configuration has them, for comparison.
        reweight: `reweight(name, value)` sets one weight in the live objective.
        groups: names for sets of parameters, each given by prefixes of parameter names or by the
            parameters themselves; the model's top-level children when empty.
        step: the number of the step that a replay takes.
        generators: where the random generators stand when that step starts; without them they are
            seeded with `seed + step`.
    """

    model: nn.Module
    batches: Callable[[int], Any] | Sequence[Any]
    loss_fn: Callable[..., Any]
    _: KW_ONLY
    name: str = ""
    seed: int = 0
    optimizer: torch.optim.Optimizer | None = None
    scaler: Any = None
    scheduler: Any = None
    train_step: TrainStep | None = None
    weights: Weights = field(default_factory=dict)
    configured: Mapping[str, float] = field(default_factory=dict)
    reweight: Callable[[str, float], object] | None = None
    groups: Mapping[str, Iterable[str | nn.Parameter]] = field(default_factory=dict)
    step: int = 0
    generators: Generators | None = None

    @classmethod
    def of(cls, value: Any) -> "Subject":
        """Take a subject in any of its shapes.

        Args:
            value: a `Subject`, a bare tuple `(model, batch, loss_fn)`, or an object with the
                attributes `model`, `batches` and `loss_fn`, and any of the others.

        Raises:
            SubjectError: it is none of these; the sentence says what came.
        """
        if isinstance(value, cls):
            return _checked(value)
        if isinstance(value, tuple) and len(value) == 3 and not hasattr(value, "batches"):
            model, batch, loss_fn = value
            return _checked(cls(model, [batch], loss_fn))
        if not all(hasattr(value, name) for name in ("model", "batches", "loss_fn")):
            raise SubjectError(
                f"a subject is a tuple (model, batch, loss_fn) or an object with model, batches "
                f"and loss_fn; got {_describe(value)}"
            )
        names = [f.name for f in dataclasses.fields(cls)]
        given = {name: getattr(value, name) for name in names if hasattr(value, name)}
        needed = {name: given.pop(name) for name in ("model", "batches", "loss_fn")}
        named = {name: item for name, item in given.items() if item is not None}
        return _checked(cls(**needed, **named))

    def at(self, step: int) -> "Subject":
        """The same subject at another step of its training."""
        known = self.generators if step == self.step else None
        return dataclasses.replace(self, step=step, generators=known)

    def set_generators(self) -> None:
        """Put the random generators where its step finds them."""
        if self.generators is not None:
            set_generators(self.generators)
        else:
            seed_generators(self.seed + self.step)

    def batch(self, index: int) -> Any:
        """The batch at an index.

        Raises:
            SubjectError: there is no such batch, or making it failed.
        """
        if not callable(self.batches):
            if not len(self.batches):
                raise SubjectError(f"batch {index} is out of range: the subject has no batches")
            if not 0 <= index < len(self.batches):
                raise SubjectError(
                    f"batch {index} is out of range: the subject has {len(self.batches)} "
                    f"(0 to {len(self.batches) - 1})"
                )
            return self.batches[index]
        if index < 0:
            raise SubjectError(f"batch {index} is out of range: batches are counted from 0")
        try:
            return self.batches(index)
        except NanhuntError:
            raise
        except (IndexError, KeyError, ValueError) as error:
            raise SubjectError(f"batch {index} is out of range: {error}") from error
        except (Exception, SystemExit) as error:
            raise SubjectError(f"making batch {index} raised {told(error)}") from error

    def call_loss(self, batch: Any) -> Any:
        """`loss_fn` on the model and a batch: a tuple is splatted, anything else one argument."""
        return self.loss_fn(self.model, *splatted(batch))

    def live_weights(self) -> dict[str, float]:
        """The weights that the live objective holds at this moment."""
        mapping = self.weights() if callable(self.weights) else self.weights
        return {name: float(value) for name, value in mapping.items()}

    def reweighted(self, name: str, value: float) -> None:
        """Set one weight in the live objective.

        Raises:
            UsageError: the subject offers no way to set weights.
        """
        if self.reweight is None:
            raise UsageError(f"the subject cannot set the weight {name!r}: it has no `reweight`")
        self.reweight(name, value)

    def parameters(self) -> list[Tensor]:
        """The model's parameters, then those that the optimizer alone holds.

        Such is a weight of the loss that is trained along and belongs to no module.
        """
        held = self.optimizer.param_groups if self.optimizer is not None else ()
        others = (parameter for group in held for parameter in group["params"])
        unique = {id(parameter): parameter for parameter in (*self.model.parameters(), *others)}
        return list(unique.values())

    def parameter_groups(self) -> dict[str, list[str]]:
        """Names of the trainable parameters in each group, in the order of the model.

        A parameter that no group names stands under its top-level child, and one that the model
        holds directly under `model`.
        """
        prefixes = {
            name: [m if isinstance(m, str) else id(m) for m in members]
            for name, members in self.groups.items()
        }
        groups: dict[str, list[str]] = {name: [] for name in prefixes}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                group = _group_of(name, id(parameter), prefixes)
                groups.setdefault(group, []).append(name)
        return {name: members for name, members in groups.items() if members}


def splatted(batch: Any) -> tuple[Any, ...]:
    """What a batch is handed to `loss_fn` as: a plain tuple's entries, else one argument."""
    return batch if isinstance(batch, tuple) and not hasattr(batch, "_fields") else (batch,)


def _checked(subject: Subject) -> Subject:
    if not isinstance(subject.model, nn.Module):
        raise SubjectError(
            f"the subject's model is to be a torch.nn.Module; got {_describe(subject.model)}"
        )
    if not callable(subject.loss_fn):
        raise SubjectError(
            f"the subject's loss_fn is to be called as loss_fn(model, *batch); "
            f"got {_describe(subject.loss_fn)}"
        )
    if not callable(subject.batches) and not isinstance(subject.batches, Sequence):
        raise SubjectError(
            f"the subject's batches are to be a function of the index or a sequence; "
            f"got {_describe(subject.batches)}"
        )
    optimizer, scaler = subject.optimizer, subject.scaler
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise SubjectError(
            f"the subject's optimizer is to be a torch.optim.Optimizer; got {_describe(optimizer)}"
        )
    if scaler is not None and not hasattr(scaler, "get_scale"):
        raise SubjectError(
            f"the subject's scaler is to be a torch.amp.GradScaler; got {_describe(scaler)}"
        )
    if subject.generators is not None and not isinstance(subject.generators, Generators):
        raise SubjectError(
            f"the subject's generators are to be what nanhunt.generators.read_generators() "
            f"returns; got {_describe(subject.generators)}"
        )
    _check_groups(subject)
    if isinstance(subject.seed, bool) or not isinstance(subject.seed, int):
        raise SubjectError(f"the subject's seed is to be a whole number; got {subject.seed!r}")
    if not any(p.requires_grad for p in subject.model.parameters()):
        count = sum(1 for _ in subject.model.parameters())
        raise SubjectError(
            f"nothing can get a gradient: none of the model's {count} parameters requires one; "
            f"unfreeze at least one"
        )
    return subject


def _check_groups(subject: Subject) -> None:
    """Refuse groups of what the model does not have: they would be empty in every report."""
    if not isinstance(subject.groups, Mapping):
        raise SubjectError(
            f"the subject's groups are to be a mapping, as in {{'head': ['head']}}; "
            f"got {_describe(subject.groups)}"
        )
    names = [name for name, _ in subject.model.named_parameters()]
    modules = {name for name, _ in subject.model.named_modules()}
    held = {id(parameter) for parameter in subject.parameters()}
    for group, members in subject.groups.items():
        if isinstance(members, str | Tensor) or not isinstance(members, Iterable):
            raise SubjectError(
                f"the subject's group {group!r} is to be a list of names or parameters, as in "
                f"['head']; got {members!r}"
            )
        for member in members:
            prefix = member.rstrip(".") if isinstance(member, str) else ""
            is_known = prefix in modules or prefix in names if prefix else id(member) in held
            if not is_known:
                tops = dict.fromkeys(name.split(".", maxsplit=1)[0] for name in names)
                what = repr(member) if isinstance(member, str) else _describe(member)
                raise SubjectError(
                    f"the subject's group {group!r} names {what}, which the model does not have; "
                    f"its parameters begin with {', '.join(tops)}"
                )


def _group_of(name: str, identity: int, prefixes: Mapping[str, list[Any]]) -> str:
    for group, members in prefixes.items():
        for member in members:
            if member in (identity, name):
                return group
            if isinstance(member, str) and name.startswith(member.rstrip(".") + "."):
                return group
    return name.split(".", maxsplit=1)[0] if "." in name else "model"


def _describe(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return "None" if value is None else f"an object of type {type(value).__name__}"


def moved(subject: Subject, device: str) -> Subject:
    """The same subject with its model, in place, and every batch on a device."""
    if device == "cpu":
        return subject
    subject.model.to(device)
    return dataclasses.replace(
        subject, batches=lambda index: map_tensors(subject.batch(index), lambda t: t.to(device))
    )


_NOT_THEIRS = (
    *(str(Path(package).parent) for package in (__file__, torch.__file__, importlib.__file__)),
    "<frozen",
)


def told(error: BaseException) -> str:
    """An error of the user's code in one line: its type, its message and where it was raised."""
    message = " ".join(str(error).split())[:300]
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(_NOT_THEIRS)]
    place = f" ({Path(theirs[-1].filename).name}:{theirs[-1].lineno})" if theirs else ""
    return f"{type(error).__name__}{': ' if message else ''}{message}{place}"
