"""Everything that a replay must put back exactly, also when the step raises.

Parameters, buffers, gradients, optimizer, scheduler and scaler state, module modes, the random
generators of Python, numpy and torch, and torch's global switches. Identity is kept: the same
tensor objects hold the same bits afterwards.
"""

import contextlib
import copy
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nanhunt.subject import Subject

_Undo = Callable[[], object]


@contextlib.contextmanager
def preserved(subject: Subject) -> Iterator[None]:
    """Put back, on leaving, all that a step of the subject may change."""
    restore = remember(subject)
    try:
        yield
    finally:
        restore()


def remember(subject: Subject) -> Callable[[], None]:
    """Remember all that a step of the subject may change; calling the result puts it back."""
    undo: list[_Undo] = [
        _keep_switches(),
        keep_generators(),
        *map(_keep_entries, subject.model.modules()),
        *map(_keep_tensor, subject.model.buffers()),
        *map(_keep_parameter, subject.parameters()),
        *_keep_optimizer(subject.optimizer),
        _keep_scaler(subject.scaler),
        _keep_scheduler(subject.scheduler),
        _keep_weights(subject),
    ]

    def restore() -> None:
        with contextlib.ExitStack() as stack:  # one that fails does not stop the others
            for action in undo:
                stack.callback(action)

    return restore


def keep_generators() -> _Undo:
    """Remember the state of every random generator; calling the result puts it back."""
    python, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002 - users draw from it
    cpu = torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numbers)  # noqa: NPY002 - as above
        torch.set_rng_state(cpu)
        for index, state in enumerate(devices):
            torch.cuda.set_rng_state(state, index)

    return restore


@functools.cache
def _has_devices() -> bool:
    return torch.accelerator.is_available()


def seed_generators(seed: int) -> None:
    """Set every random generator as the start of each replay has it."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - users draw from it
    if _has_devices():
        torch.manual_seed(seed)
    else:  # `manual_seed` takes longer than a small model's forward to tell devices that are absent
        torch.default_generator.manual_seed(seed)


def _keep_switches() -> _Undo:
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    anomaly = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    precision = torch.get_float32_matmul_precision()

    def restore() -> None:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        torch.autograd.set_detect_anomaly(*anomaly)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.set_float32_matmul_precision(precision)
        torch.clear_autocast_cache()

    return restore


def _keep_tensor(tensor: Tensor) -> _Undo:
    """Remember the bits, and the memory that held them: a cast gives the tensor another one."""
    home, version = tensor.data, tensor.detach().clone()

    def restore() -> None:
        if tensor.data.data_ptr() != home.data_ptr() or tensor.dtype != home.dtype:
            tensor.data = home
        if not _same_bits(home, version):
            with torch.no_grad():
                home.copy_(version)

    return restore


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one dtype hold the same bits (NaN equals NaN, -0.0 is not 0.0)."""
    if one.layout is not torch.strided or one.is_quantized:
        return False
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if one.is_complex():
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    kind = width[one.element_size()]
    return torch.equal(one.view(kind), other.view(kind))


def _keep_entries(module: nn.Module) -> _Undo:
    training = module.training
    parameters, buffers = dict(module._parameters), dict(module._buffers)  # noqa: SLF001

    def restore() -> None:
        module.training = training
        # Setting them through the module would register, and so check, them anew.
        module.__dict__["_parameters"].clear()
        module.__dict__["_parameters"].update(parameters)
        module.__dict__["_buffers"].clear()
        module.__dict__["_buffers"].update(buffers)

    return restore


def _keep_parameter(parameter: Tensor) -> _Undo:
    gradient, flag = parameter.grad, parameter.requires_grad
    put_back = _keep_tensor(parameter)
    put_gradient_back = _keep_tensor(gradient) if gradient is not None else None

    def restore() -> None:
        # A gradient must have its parameter's dtype, so the parameter comes first.
        parameter.grad = None
        put_back()
        parameter.requires_grad_(flag)
        if put_gradient_back is not None:
            put_gradient_back()
        parameter.grad = gradient

    return restore


def _keep_optimizer(optimizer: torch.optim.Optimizer | None) -> Iterator[_Undo]:
    if optimizer is None:
        return
    state = {p: dict(values) for p, values in optimizer.state.items()}
    # A learning rate may be a tensor, which a scheduler holds as well.
    tables = [*state.values(), *optimizer.param_groups]
    yield from (_keep_tensor(v) for table in tables for v in table.values() if _is_tensor(v))
    yield from map(_keep_group, optimizer.param_groups)

    def restore() -> None:
        optimizer.state.clear()
        optimizer.state.update({p: dict(values) for p, values in state.items()})

    yield restore


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _keep_group(group: dict[str, Any]) -> _Undo:
    kept = {
        key: value if key == "params" or _is_tensor(value) else copy.copy(value)
        for key, value in group.items()
    }

    def restore() -> None:
        group.clear()
        group.update(kept)

    return restore


def _keep_scaler(scaler: Any) -> _Undo:
    if scaler is None:
        return lambda: None
    state = copy.deepcopy(scaler.state_dict())

    def restore() -> None:
        if state:  # a disabled scaler has no state
            scaler.load_state_dict(state)

    return restore


def _keep_scheduler(scheduler: Any) -> _Undo:
    if not hasattr(scheduler, "state_dict"):
        return lambda: None
    state = copy.deepcopy(scheduler.state_dict())
    return lambda: scheduler.load_state_dict(state)


def _keep_weights(subject: Subject) -> _Undo:
    before = subject.live_weights()

    def restore() -> None:
        for name, value in subject.live_weights().items():
            if name in before and value != before[name]:
                subject.reweighted(name, before[name])

    return restore
