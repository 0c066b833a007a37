"""What a capsule holds: one training step as it stood before it was taken."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nanhunt.generators import Generators

# Of the layout of the files; a reader of another schema refuses.
SCHEMA = 1


class UnfitError(Exception):
    """Something that no capsule holds, told without the name of the file."""


@dataclass(frozen=True, slots=True)
class Absent:
    """Stands in a batch where something stood that a capsule cannot hold.

    `place` is the expression that reaches it, `kind` says what it was.
    """

    place: str
    kind: str


@dataclass(frozen=True, slots=True)
class Settings:
    """Torch's global settings that decide over the bits of a step, and the modes of its modules.

    Args:
        device: the type of the device on which the model stood.
        autocast: (device type, enabled, dtype) of each autocast state around the step.
        autocast_cache: whether autocast kept the weights that it had cast.
        scaler: `state_dict` of the `GradScaler`; None or empty where the loss was not scaled.
        deterministic: of `torch.use_deterministic_algorithms`.
        deterministic_warn_only: of the same.
        precision: of `torch.set_float32_matmul_precision`.
        flags: the switches of torch's backends, by their names below `torch.backends`.
        threads: of `torch.set_num_threads`.
        default_dtype: of `torch.set_default_dtype`.
        flush_denormal: of `torch.set_flush_denormal`.
        training: for each module whether it is in training mode.
    """

    device: str = "cpu"
    autocast: tuple[tuple[str, bool, str], ...] = ()
    autocast_cache: bool = True
    scaler: Mapping[str, Any] | None = None
    deterministic: bool = False
    deterministic_warn_only: bool = False
    precision: str = "highest"
    flags: Mapping[str, bool] = field(default_factory=dict)
    threads: int = 1
    default_dtype: str = "float32"
    flush_denormal: bool = False
    training: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Capsule:
    """One training step: what it starts from, what it is given, and where it ran.

    Args:
        model: parameters and buffers by name, also buffers that a `state_dict` leaves out. A
            parameter is an `nn.Parameter`; one that has two names stands under both.
        batch: what the step was given.
        generators: where the random generators stood before the step.
        settings: torch's settings around the step.
        optimizer: its `state_dict`, where it was asked for.
        scheduler: its `state_dict`, where it was asked for.
        loss: of the original step; None where it is not known.
        fingerprint: digest of loss and gradients of the original step, as `nanhunt.replay` makes
            it; empty where it is not known.
        step: the number of the step.
        rank: of the process that took it.
        subject: the spec of a factory that builds the subject; empty where it is not known.
        versions: package and version, of those that wrote it.
        machine: what else decides over bits: build, processor, device.
        others: parameters that the optimizer alone holds, as a weight of the loss that is trained.
        devices: tensors of the batch, by the expressions that reach them, and the device on which
            each was; in a capsule that was read all are on the CPU.
        incomplete: what could not be stored, by name.
        note: a sentence for the reader, as the culprit that was found.
    """

    model: Mapping[str, Tensor]
    batch: Any
    generators: Generators
    settings: Settings = field(default_factory=Settings)
    optimizer: Mapping[str, Any] | None = None
    scheduler: Mapping[str, Any] | None = None
    loss: float | None = None
    fingerprint: str = ""
    step: int = 0
    rank: int = 0
    subject: str = ""
    versions: tuple[tuple[str, str], ...] = ()
    machine: tuple[tuple[str, str], ...] = ()
    others: tuple[Tensor, ...] = ()
    devices: tuple[tuple[str, str], ...] = ()
    incomplete: tuple[str, ...] = ()
    note: str = ""
