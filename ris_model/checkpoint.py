"""Checkpoint: a training at a moment, whole on disk; and the model that it holds.

One safetensors file: the parameters, their moving average and the optimizer's state as tensors,
everything else as JSON in its header. Random states are not among it: those of a step follow from
the seed, the step and the process (see `training.loop`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ris_model.config import Config, Profile
from ris_model.network import Detector, Localiser
from ris_model.storage import read_fields, read_tensors, write_tensors

# Profile -> its network.
NETWORKS: dict[Profile, type[Localiser | Detector]] = {"incident": Localiser, "sound": Detector}
# The files of a run.
BEST, LAST = "best.safetensors", "last.safetensors"

_FORM = "checkpoint"


@dataclass(frozen=True, slots=True)
class Origin:
    """What a training was begun with."""

    config: Config
    profile: Profile
    seed: int
    amp: str
    preset: str = ""  # where the configuration is that of a preset
    data: str = ""  # folder of the shards; without it scenes are drawn
    curriculum: bool = False


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A training at a moment."""

    origin: Origin
    model: dict[str, torch.Tensor]
    average: dict[str, torch.Tensor]  # moving average of the parameters
    optimizer: dict[str, Any]  # a state_dict
    state: dict[str, Any] = field(default_factory=dict)  # JSON: counters, schedule, scaler


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; the file that was there is replaced in one step or not at all."""
    states = checkpoint.optimizer["state"]
    flat = {f"{index}/{name}": t for index, state in states.items() for name, t in state.items()}
    tensors = {
        f"{part}/{name}": tensor
        for part, group in (
            ("model", checkpoint.model),
            ("average", checkpoint.average),
            ("optimizer", flat),
        )
        for name, tensor in group.items()
    }
    record = {
        "origin": asdict(checkpoint.origin),
        "groups": checkpoint.optimizer["param_groups"],
        "state": checkpoint.state,
    }
    write_tensors(path, tensors, form=_FORM, record=record)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; a folder stands for the last one in it.

    Raises:
        ValueError: when there is none, it is not whole, or of another kind.
    """
    file = path / LAST if path.is_dir() else path
    tensors, record = read_tensors(file, form=_FORM)
    states: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in _pick("optimizer", tensors).items():
        index, _, key = name.partition("/")
        states.setdefault(int(index), {})[key] = tensor
    return Checkpoint(
        origin=read_fields(Origin, record["origin"], place=str(file)),
        model=_pick("model", tensors),
        average=_pick("average", tensors),
        optimizer={"state": states, "param_groups": record["groups"]},
        state=record["state"],
    )


def load_model(path: Path | str) -> tuple[nn.Module, Config]:
    """Read the model of a checkpoint: the averaged parameters, in evaluation mode, on the CPU.

    Args:
        path: a checkpoint, or the folder of a run, which stands for the best one in it.

    Raises:
        ValueError: when there is none, it is not whole, or does not fit its own configuration.
    """
    given = Path(path)
    file = given / BEST if given.is_dir() else given
    checkpoint = load_checkpoint(file)
    config = checkpoint.origin.config
    model = NETWORKS[checkpoint.origin.profile](config)
    fill_model(model, checkpoint.average, file)
    return model.eval(), config


def fill_model(model: nn.Module, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Copy parameters into a model; a ValueError names the first that does not fit."""
    wanted = model.state_dict()
    for name in sorted(wanted.keys() | tensors.keys()):
        came = tuple(tensors[name].shape) if name in tensors else "missing"
        fits = tuple(wanted[name].shape) if name in wanted else "not wanted"
        if came != fits:
            msg = f"{path} does not fit this network: {name} is {came} there, {fits} here"
            raise ValueError(msg)
    model.load_state_dict(dict(tensors))


def _pick(part: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a part, by their names in it."""
    prefix = f"{part}/"
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
