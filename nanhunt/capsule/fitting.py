"""A capsule fitted to a freshly built subject: its state, its batch, its place in the training."""

import copy
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nanhunt.capsule.contents import Capsule
from nanhunt.capsule.lookalikes import adopted
from nanhunt.capsule.moment import plain_name, strangers, unwrapped
from nanhunt.errors import CapsuleError, NanhuntError
from nanhunt.structure import map_tensors, named_tensors
from nanhunt.subject import Subject, told


def open_capsule(capsule: Capsule, subject: Any) -> Subject:
    """Put a subject where the step of a capsule started.

    Its model is changed in place: parameters, buffers and the modes of its modules. Named tuples
    and data classes of the batch get their own types where importing the subject has brought them.
    `settings_applied` is to be entered around what follows.

    Args:
        capsule: what `read_capsule` or `capture` returned.
        subject: freshly built, in any shape that `Subject.of` takes.

    Returns:
        A subject with one batch that starts as the step did.

    Raises:
        CapsuleError: the capsule does not fit; the sentence names the first thing that differs.
    """
    built = Subject.of(subject)
    try:
        return _fitted(capsule, built)
    except NanhuntError:
        raise
    except Exception as error:  # states are of any shape where a file was made by hand
        raise CapsuleError(f"the capsule does not fit the subject: {told(error)}") from error


def _fitted(capsule: Capsule, built: Subject) -> Subject:
    model = unwrapped(built.model)
    _check_model(capsule, model)
    _fill_model(capsule, model)
    for name, module in model.named_modules():
        module.training = capsule.settings.training.get(plain_name(name), module.training)
    if built.optimizer is not None and capsule.optimizer is not None:
        _fill_strangers(capsule, list(strangers(model, built.optimizer)))
        _fill_optimizer(capsule.optimizer, built.optimizer)
    if built.scheduler is not None and capsule.scheduler is not None:
        _fill_scheduler(capsule.scheduler, built.scheduler)
    return dataclasses.replace(
        built,
        batches=[_batch(capsule, built)],
        scaler=_scaler(capsule, built),
        generators=capsule.generators,
        step=capsule.step,
    )


def unused(capsule: Capsule, subject: Subject) -> tuple[str, ...]:
    """What a capsule holds and a subject has no place for, as sentences for a report."""
    notes = []
    for name, said in (("optimizer", "an optimizer"), ("scheduler", "a scheduler")):
        if getattr(capsule, name) is not None and getattr(subject, name) is None:
            notes.append(f"the capsule holds the state of {said}, and the subject has none")
    if subject.scaler is not None and not capsule.settings.scaler:
        notes.append("the subject's scaler is left out: the step of the capsule had none")
    if capsule.optimizer is None and subject.optimizer is not None:
        notes.append("the capsule holds no optimizer state: the optimizer starts anew")
    return tuple(notes)


# --- the model -----------------------------------------------------------------------------------


def _check_model(capsule: Capsule, model: nn.Module) -> None:
    """Compare the names, shapes, dtypes and ties of the parameters, and the names of buffers."""
    here = {plain_name(n): p for n, p in model.named_parameters(remove_duplicate=False)}
    there = {n: t for n, t in capsule.model.items() if isinstance(t, nn.Parameter)}
    for name, parameter in here.items():
        if nn.parameter.is_lazy(parameter):
            raise CapsuleError(
                f"the subject's {name} has no shape yet; call the model once in its factory"
            )
        if name not in there:
            raise _misfit(name, "is not in the capsule")
        kept = there[name]
        if kept.shape != parameter.shape or kept.dtype != parameter.dtype:
            raise _misfit(
                name, f"is {_told(parameter)} in the subject and {_told(kept)} in the capsule"
            )
    for name in there:
        if name not in here:
            raise _misfit(name, "of the capsule is not in the subject")
    _check_ties(here, there)
    _check_buffers(capsule, model, here)


def _check_buffers(capsule: Capsule, model: nn.Module, here: Mapping[str, Tensor]) -> None:
    """Compare the names of buffers; one that the capsule has alone is one that a forward makes."""
    for name, _ in model.named_buffers(remove_duplicate=False):
        if plain_name(name) not in capsule.model:
            raise _misfit(plain_name(name), "is not in the capsule")
    modules = {plain_name(name) for name, _ in model.named_modules()}
    for name in capsule.model:
        if name not in here and name.rpartition(".")[0] not in modules:
            raise _misfit(name, "of the capsule has no module in the subject")


def _check_ties(here: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> None:
    """Compare which names stand for the same parameter."""
    ties, kept_ties = _first_names(here), _first_names(there)
    for name in here:
        if ties[name] != kept_ties[name]:
            raise _misfit(
                name,
                f"is {_tied(ties[name], name)} in the subject and "
                f"{_tied(kept_ties[name], name)} in the capsule",
            )


def _misfit(name: str, what: str) -> CapsuleError:
    return CapsuleError(
        f"the capsule does not fit the subject: {name} {what}; build it as it was in the training"
    )


def _told(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{[*tensor.shape]}"


def _tied(first: str, name: str) -> str:
    return "a tensor of its own" if first == name else f"the same as {first}"


def _first_names(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """For each name the first one under which the same parameter stands."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in parameters.items()}


def _fill_model(capsule: Capsule, model: nn.Module) -> None:
    parameters = {plain_name(n): p for n, p in model.named_parameters(remove_duplicate=False)}
    device = next((p.device for p in parameters.values()), torch.device("cpu"))
    for name, parameter in parameters.items():
        kept = capsule.model[name]
        _fill(parameter, kept)
        parameter.requires_grad_(kept.requires_grad)
        parameter.grad = None
    modules = {plain_name(name): module for name, module in model.named_modules()}
    for name, kept in capsule.model.items():
        if name in parameters:
            continue
        home, _, leaf = name.rpartition(".")
        module = modules[home]
        buffer = module._buffers.get(leaf)  # noqa: SLF001 - a buffer that the forward has made
        if buffer is not None and buffer.shape == kept.shape and buffer.dtype == kept.dtype:
            _fill(buffer, kept)
        elif hasattr(module, leaf) and leaf not in module._buffers:  # noqa: SLF001 - as above
            raise _misfit(name, "is a buffer in the capsule and something else in the subject")
        else:
            module.register_buffer(leaf, _moved(kept, device).detach().clone(), persistent=False)


def _fill(tensor: Tensor, kept: Tensor) -> None:
    """Give a tensor the values of another, and its strides, on which bits may depend."""
    if tensor.layout is torch.strided and tensor.stride() == kept.stride():
        with torch.no_grad():
            tensor.copy_(kept)
    else:
        tensor.data = _moved(kept.detach(), tensor.device).clone()


def _moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    return tensor.to(device)


# --- what goes with it ---------------------------------------------------------------------------


def _fill_strangers(capsule: Capsule, parameters: list[Tensor]) -> None:
    """Parameters that are the optimizer's alone, in its order."""
    shapes = [_told(kept) for kept in capsule.others]
    if shapes != [_told(parameter) for parameter in parameters]:
        raise CapsuleError(
            f"the capsule does not fit the subject: beside the model, its optimizer held "
            f"{', '.join(shapes) or 'nothing'} and the subject's holds "
            f"{', '.join(map(_told, parameters)) or 'nothing'}"
        )
    for parameter, kept in zip(parameters, capsule.others, strict=True):
        _fill(parameter, kept)
        parameter.requires_grad_(kept.requires_grad)
        parameter.grad = None


def _fill_optimizer(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Not `load_state_dict`: that casts states to the dtype of their parameter."""
    groups, kept = optimizer.param_groups, state.get("param_groups")
    fault = CapsuleError(
        f"the optimizer state of the capsule does not fit the subject's "
        f"{type(optimizer).__name__}: their groups of parameters differ; build it as it was in "
        f"the training"
    )
    if not isinstance(kept, list) or not isinstance(state.get("state"), dict):
        raise fault
    sizes = [len(group.get("params", ())) if isinstance(group, dict) else -1 for group in kept]
    if sizes != [len(group["params"]) for group in groups]:
        raise fault
    parameters = [p for group in groups for p in group["params"]]
    numbers = [n for group in kept for n in group["params"]]
    optimizer.state.clear()
    for parameter, number in zip(parameters, numbers, strict=True):
        values = state["state"].get(number) if isinstance(number, int) else None
        if isinstance(values, dict):
            optimizer.state[parameter] = {
                key: _own_state(key, value, parameter) for key, value in values.items()
            }
    for group, was in zip(groups, kept, strict=True):
        group.update({key: copy.copy(value) for key, value in was.items() if key != "params"})


def _own_state(key: str, value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    # Counters of steps stay on the CPU unless a kernel reads them.
    return value.clone() if key == "step" else _moved(value, parameter.device).clone()


def _fill_scheduler(state: Mapping[str, Any], scheduler: Any) -> None:
    """Only what the scheduler has by itself is set: its state is put into its attributes."""
    own = scheduler.state_dict() if hasattr(scheduler, "state_dict") else {}
    scheduler.load_state_dict({**own, **{k: v for k, v in state.items() if k in own}})


def _scaler(capsule: Capsule, subject: Subject) -> Any:
    """The subject's scaler, or a new one, with the state of the capsule's; None if it had none."""
    state = capsule.settings.scaler
    if not state:
        return None
    device = next((p.device.type for p in subject.model.parameters()), "cpu")
    scaler = subject.scaler if subject.scaler is not None else torch.amp.GradScaler(device)
    scaler.load_state_dict(dict(state))
    return scaler


def _batch(capsule: Capsule, subject: Subject) -> Any:
    """The batch in its own types, on the device of the model where it was on that of the model."""
    homes = dict.fromkeys(_homes(subject))
    batch = adopted(capsule.batch, homes)
    device = next((p.device for p in subject.model.parameters()), torch.device("cpu"))
    if device.type == "cpu":
        return batch
    names = named_tensors(batch)
    home = capsule.settings.device
    stays = {name for name, where in capsule.devices if where.partition(":")[0] != home}
    kept = {id(tensor) for name, tensor in names if name in stays}
    return map_tensors(batch, lambda t: t if id(t) in kept else _moved(t, device))


def _homes(subject: Subject) -> Iterator[str]:
    """Modules of the user's code, where a type of a script may be found under another name."""
    for value in (subject.loss_fn, type(subject.model), *map(type, subject.model.modules())):
        name = getattr(value, "__module__", None)
        if isinstance(name, str) and name in sys.modules and not name.startswith("torch."):
            yield name
