"""What is examined: a model, its batches and its loss, and how to find them by name.

The contract is a shape, not a class: any object with the attributes of `Subject` is one, so that a
package can offer its training step for examination without depending on nanhunt.
"""

import copy
import dataclasses
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nanhunt.errors import SubjectError, UsageError

Weights: TypeAlias = Mapping[str, float] | Callable[[], Mapping[str, float]]


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
        scheduler: kept for those who step it; a replay does not.
        weights: the weights of the loss terms *as the live objective holds them*; give a function
            where the mapping does not follow `reweight`.
        reweight: `reweight(name, value)` sets one weight in the live objective.
        groups: names for sets of parameters, each given by prefixes of parameter names or by the
            parameters themselves; the model's top-level children when empty.
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
    weights: Weights = field(default_factory=dict)
    reweight: Callable[[str, float], object] | None = None
    groups: Mapping[str, Iterable[str | nn.Parameter]] = field(default_factory=dict)

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
            return value
        if isinstance(value, tuple) and len(value) == 3:
            model, batch, loss_fn = value
            return _checked(cls(model, [batch], loss_fn))
        if not all(hasattr(value, name) for name in ("model", "batches", "loss_fn")):
            raise SubjectError(
                f"a subject is a tuple (model, batch, loss_fn) or an object with model, batches "
                f"and loss_fn; got {_describe(value)}"
            )
        names = [f.name for f in dataclasses.fields(cls)]
        given = {name: getattr(value, name) for name in names if hasattr(value, name)}
        return _checked(cls(**given))

    def batch(self, index: int) -> Any:
        """The batch at an index.

        Raises:
            SubjectError: there is no such batch, or making it failed.
        """
        if not callable(self.batches):
            if not 0 <= index < len(self.batches):
                raise SubjectError(
                    f"batch {index} is out of range: the subject has {len(self.batches)} "
                    f"(0 to {len(self.batches) - 1})"
                )
            return self.batches[index]
        try:
            return self.batches(index)
        except (IndexError, KeyError, ValueError) as error:
            raise SubjectError(f"batch {index} is out of range: {error}") from error

    def call_loss(self, batch: Any) -> Any:
        """`loss_fn` on the model and a batch: a tuple is splatted, anything else one argument."""
        is_tuple = isinstance(batch, tuple) and not hasattr(batch, "_fields")
        return self.loss_fn(self.model, *(batch if is_tuple else (batch,)))

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
    if not any(p.requires_grad for p in subject.model.parameters()):
        count = sum(1 for _ in subject.model.parameters())
        raise SubjectError(
            f"nothing can get a gradient: none of the model's {count} parameters requires one; "
            f"unfreeze at least one"
        )
    return subject


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


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Rebuild a batch with every tensor in it changed; other values are kept as they are.

    Looks into tuples, named tuples, lists, mappings and data classes. A tensor that occurs twice
    is changed once, so that aliases stay aliases.
    """
    known: dict[int, Tensor] = {}

    def once(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            known[id(tensor)] = change(tensor)
        return known[id(tensor)]

    return _map(value, once)


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, change) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_map(item, change) for item in value)
    if isinstance(value, dict):
        changed = copy.copy(value)  # keeps the class, and what else it carries
        for key, item in value.items():
            changed[key] = _map(item, change)
        return changed
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **_map(fields, change))
    return value


def named_tensors(value: Any, name: str = "batch") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a batch with the expression that reaches it: `batch[0]`, `batch.y`."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for key in value._fields:
            yield from named_tensors(getattr(value, key), f"{name}.{key}")
    elif isinstance(value, (tuple, list)):
        for position, item in enumerate(value):
            yield from named_tensors(item, f"{name}[{position}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from named_tensors(item, f"{name}[{key!r}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for entry in dataclasses.fields(value):
            yield from named_tensors(getattr(value, entry.name), f"{name}.{entry.name}")


def count_samples(batch: Any) -> int | None:
    """The leading size that most tensors of a batch share; None when there is none."""
    sizes = [tensor.shape[0] for _, tensor in named_tensors(batch) if tensor.dim() > 0]
    return max(set(sizes), key=sizes.count) if sizes else None


_NOT_THEIRS = (str(Path(__file__).parent), str(Path(torch.__file__).parent), "<frozen")


def told(error: BaseException) -> str:
    """An error of the user's code in one line: its type, its message and where it was raised."""
    message = " ".join(str(error).split())[:300]
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(_NOT_THEIRS)]
    place = f" ({Path(theirs[-1].filename).name}:{theirs[-1].lineno})" if theirs else ""
    return f"{type(error).__name__}{': ' if message else ''}{message}{place}"
