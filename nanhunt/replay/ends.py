"""What is measured at the ends of a step: the state before it, gradients and parameters after."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nanhunt import measurement
from nanhunt.recorder import Recorder, unrecorded
from nanhunt.records import Group, Sink, SinkKind, TensorFacts
from nanhunt.structure import named_tensors
from nanhunt.subject import Subject


def is_finite(tensor: Tensor) -> bool:
    """Whether every element is finite."""
    return measurement.count(measurement.local(tensor).detach()).is_finite


def read_sink(
    kind: SinkKind,
    name: str,
    tensor: Tensor,
    recorder: Recorder | None,
    group: str = "",
    order: int = 0,
) -> Sink:
    """Count one tensor and, if it is not finite, ask the recorder who made it so."""
    own = measurement.local(tensor)
    facts = measurement.count(own.detach())
    if facts.is_finite:
        return Sink(kind, name, facts, group, order=order)
    where = measurement.first_indices(measurement.nonfinite_mask(own.detach()))
    last = recorder.sources_of(own) if recorder else ()
    return Sink(kind, name, facts, group, last, where[0] if where else (), order)


def note_state(recorder: Recorder, subject: Subject, batch: Any) -> None:
    """Tell the recorder which tensors are non-finite before the step."""
    kinds: list[tuple[SinkKind, str, Tensor]] = [
        *(("batch", name, tensor) for name, tensor in named_tensors(batch)),
        *(("parameter", name, tensor) for name, tensor in subject.model.named_parameters()),
        *(("buffer", name, tensor) for name, tensor in subject.model.named_buffers()),
        *(("gradient", name, tensor) for name, tensor in named_gradients(subject.model)),
        *(("optimizer", name, tensor) for name, tensor in _optimizer_tensors(subject)),
    ]
    with unrecorded():
        found = [entry for entry in kinds if not is_finite(entry[2])]
        suspicious = _unwritten(
            subject.model, [name for kind, name, _ in found if kind == "parameter"]
        )
        for kind, name, tensor in found:
            is_unwritten = kind == "parameter" and name in suspicious
            sink = replace(read_sink(kind, name, tensor, None), is_unwritten=is_unwritten)
            recorder.note_state(sink, tensor)


def named_gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The gradients that an earlier backward has left, as `weight.grad`."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield f"{name}.grad", parameter.grad


# Numbers of one tensor that lie so many orders of magnitude apart were not made by any initialiser.
_SPREAD = 1e30


def _unwritten(model: nn.Module, nonfinite: list[str]) -> list[str]:
    """Which parameters look like memory that was never written to.

    All of one is NaN, as torch itself fills such memory on request, or its numbers lie as far
    apart as random bits do. Where most parameters are so, an earlier step has spoiled them.
    """
    parameters = dict(model.named_parameters())
    looks = [
        name for name in nonfinite if _looks_unwritten(measurement.local(parameters[name]).detach())
    ]
    return looks if 2 * len(looks) <= len(parameters) else []


def _looks_unwritten(tensor: Tensor) -> bool:
    values = measurement.dense(tensor)
    if not values.is_floating_point():
        return False
    if bool(torch.isnan(values).all()):
        return True
    sizes = values[torch.isfinite(values) & (values != 0)].abs().double()
    return bool(sizes.numel() and sizes.max() / sizes.min() > _SPREAD)


def measure_batch(batch: Any) -> tuple[tuple[str, TensorFacts], ...]:
    """What was counted in each tensor of the batch, by name."""
    return tuple((name, measurement.count(tensor)) for name, tensor in named_tensors(batch))


def measure_outputs(recorder: Recorder) -> tuple[Sink, ...]:
    """What the root module returned in the forward that was just recorded."""
    with unrecorded():
        return tuple(
            read_sink("output", name, tensor, recorder) for name, tensor in recorder.outputs
        )


def _optimizer_tensors(subject: Subject) -> Iterator[tuple[str, Tensor]]:
    if subject.optimizer is None:
        return
    names: dict[Tensor, str] = {p: name for name, p in subject.model.named_parameters()}
    for parameter, values in subject.optimizer.state.items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                yield f"{key} of {names.get(parameter, 'a parameter')}", value


def measure_gradients(
    subject: Subject, recorder: Recorder | None, order: int
) -> tuple[list[Group], list[Sink]]:
    """Norm and count per group, and a sink for every non-finite gradient."""
    parameters: dict[str, nn.Parameter] = dict(subject.model.named_parameters())
    groups: list[Group] = []
    sinks: list[Sink] = []
    with unrecorded(), torch.no_grad():
        for group, names in subject.parameter_groups().items():
            found = [(name, parameters[name].grad) for name in names]
            given = [(name, grad) for name, grad in found if grad is not None]
            norms = [_norm(grad) for _, grad in given]
            poisoned = [
                read_sink("gradient", name, grad, recorder, group, order)
                for (name, grad), norm in zip(given, norms, strict=True)
                if not math.isfinite(norm) and not is_finite(grad)
            ]
            sinks.extend(poisoned)
            total = math.hypot(*norms) if not poisoned else math.nan
            groups.append(Group(group, total, len(poisoned), len(names), len(names) - len(given)))
    return groups, sinks


def without_gradient(model: nn.Module) -> tuple[str, ...]:
    """Names of the trainable parameters that got no gradient."""
    named = model.named_parameters()
    return tuple(name for name, p in named if p.requires_grad and p.grad is None)


def _norm(gradient: Tensor) -> float:
    values = measurement.dense(gradient)
    wide = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    norm = float(torch.linalg.vector_norm(wide))
    if math.isinf(norm) and is_finite(values):  # the squares do not fit, the norm may
        largest = wide.abs().max()
        norm = float(largest) * float(torch.linalg.vector_norm(wide / largest))
    return norm


_WITH_NAN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def fingerprint(loss: Tensor, model: nn.Module, *, scale: float = 1.0) -> str:
    """Digest loss and gradients bit by bit, the gradients divided by a scale of the loss.

    One NaN is as good as another: its sign and payload follow the order of the operands, and that
    is not the same under a recorder.
    """
    digest = hashlib.blake2b(digest_size=16)
    for position, tensor in enumerate((loss, *(p.grad for p in model.parameters()))):
        if tensor is None:
            digest.update(b"none")
            continue
        values = measurement.dense(tensor).detach().contiguous().reshape(-1).cpu()
        if position and scale != 1.0:
            values = values / scale
        if values.is_complex():
            values = torch.view_as_real(values).reshape(-1)
        if values.dtype in _WITH_NAN and measurement.is_suspect(values):
            values = values.masked_fill(values.isnan(), math.nan)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()
