"""The moment before a step, read from the live objects."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from numpy.random import RandomState
from torch import Tensor, nn

from nanhunt.capsule.contents import Capsule
from nanhunt.capsule.machine import read_machine
from nanhunt.capsule.record import find_lost
from nanhunt.capsule.switches import read_settings
from nanhunt.generators import Generators, read_generators
from nanhunt.structure import named_tensors
from nanhunt.versions import versions

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)
_COMPILED = "_orig_mod"


def capture(  # noqa: PLR0913 - one parameter for each thing that a step depends on, all by name
    model: nn.Module,
    batch: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    scaler: Any = None,
    generators: Generators | None = None,
    loss: float | Tensor | None = None,
    fingerprint: str = "",
    step: int = 0,
    rank: int = 0,
    subject: str = "",
    note: str = "",
) -> Capsule:
    """Take up the state from which a step starts.

    Tensors are held, not copied, so that it costs little; what is to stay as it is now must be
    written before training goes on. Random generators and settings are copied.

    Args:
        model: its parameters, buffers and the modes of its modules are taken.
        batch: what the step is given.
        optimizer: its state is taken too, and parameters that it alone holds.
        scheduler: its state is taken too.
        scaler: the `GradScaler` of the step; without one, its loss is replayed unscaled.
        generators: where the random generators stood before the step; else where they stand.
        loss: of the original step.
        fingerprint: digest of loss and gradients of the original step.
        step: the number of the step.
        rank: of this process.
        subject: the spec of a factory that builds the subject, for `nanhunt replay --trust`.
        note: a sentence for the reader, as the culprit.

    Returns:
        The capsule, with what cannot be stored named in `incomplete`.
    """
    bare = unwrapped(model)
    known, lost = _checked(read_generators() if generators is None else generators)
    settings = read_settings(bare, scaler=scaler)
    capsule = Capsule(
        model=named_state(bare),
        batch=batch,
        generators=known,
        settings=settings,
        optimizer=optimizer.state_dict() if optimizer is not None else None,
        scheduler=_state_of(scheduler),
        loss=float(loss) if loss is not None else None,
        fingerprint=fingerprint,
        step=step,
        rank=rank,
        subject=subject,
        versions=versions(),
        machine=read_machine(settings.device),
        others=tuple(strangers(bare, optimizer)),
        devices=tuple((name, str(tensor.device)) for name, tensor in named_tensors(batch)),
        incomplete=(*lost, *_extra_states(bare)),
        note=note,
    )
    return replace(capsule, incomplete=find_lost(capsule))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what shares it among processes or compiles it."""
    inner: Any = model
    while isinstance(inner, _WRAPPERS) or _COMPILED in inner._modules:  # noqa: SLF001 - no other way
        inner = getattr(inner, _COMPILED) if _COMPILED in inner._modules else inner.module  # noqa: SLF001
    bare: nn.Module = inner
    return bare


def named_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each under all of its names; compiled parts leave no trace."""
    pairs = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {plain_name(name): tensor for name, tensor in pairs}


def strangers(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[Tensor]:
    """The parameters that an optimizer holds and a model does not, each once."""
    known = {id(parameter) for parameter in model.parameters()}
    for group in optimizer.param_groups if optimizer is not None else ():
        for parameter in group["params"]:
            if id(parameter) not in known:
                known.add(id(parameter))
                yield parameter


def plain_name(name: str) -> str:
    """A name without the parts that compiling a module adds."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def _state_of(scheduler: Any) -> dict[str, Any] | None:
    return dict(scheduler.state_dict()) if hasattr(scheduler, "state_dict") else None


def _checked(generators: Generators) -> tuple[Generators, tuple[str, ...]]:
    """The states, with that of numpy replaced where it is of a kind that a file does not hold."""
    numbers = generators.numbers
    if isinstance(numbers, tuple) and numbers and numbers[0] == "MT19937":
        return generators, ()
    fresh: Any = RandomState(0).get_state()
    lost = "generators.numbers (numpy's global generator is no Mersenne twister)"
    return replace(generators, numbers=fresh), (lost,)


def _extra_states(model: nn.Module) -> tuple[str, ...]:
    """Modules with a state of their own making; giving it back would run code on a file's data."""
    return tuple(
        f"model.{name or '(root)'} (its extra state)"
        for name, module in model.named_modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    )
