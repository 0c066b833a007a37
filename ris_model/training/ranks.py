"""Ranks: the processes of one training, and the few numbers that they agree on."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of the training; alone by default."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        """Whether this is the one process that logs and writes."""
        return self.rank == 0

    def wrap(self, model: nn.Module, *, unused: bool, unread: Sequence[str] = ()) -> nn.Module:
        """Return the model whose backward averages the gradients over the ranks.

        Args:
            model: on this rank's device.
            unused: whether the loss leaves some parameters without a gradient.
            unread: beginnings of the names of those that only make outputs which no loss reads.
        """
        if self.world == 1:
            return model
        if unread:  # the reducer would wait for whatever leads to an output
            left_out = [n for n, _ in model.named_parameters() if n.startswith(tuple(unread))]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, left_out)  # noqa: SLF001 - no public name
        # the buffers follow from the configuration: they are the same everywhere
        return DistributedDataParallel(
            model, forward_sync_buffers=False, find_unused_parameters=unused
        )

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum numbers over the ranks, in double precision."""
        if self.world == 1:
            return list(values)
        # NCCL reduces what lies on its device, gloo what lies on the CPU
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether some rank has raised it; one reduction."""
        return [total > 0 for total in self.sum([float(flag) for flag in flags])]

    def take_share(self, total: int) -> slice:
        """Return this rank's part of so many scenes; a ValueError when they cannot be shared."""
        if total % self.world:
            msg = f"a batch of {total} cannot be shared by {self.world} processes; give a multiple"
            raise ValueError(msg)
        share = total // self.world
        return slice(self.rank * share, (self.rank + 1) * share)


@contextmanager
def join_ranks(device: str = "auto") -> Iterator[Ranks]:
    """Join the processes that torchrun started, or be alone; NCCL on CUDA, gloo on the CPU.

    What holds a wrapped model is to be gone when the context ends.

    Args:
        device: "cpu", "cuda", or "auto" for CUDA where there is one.

    Raises:
        ValueError: when the device is not known or not there.
    """
    world, local = (int(os.environ.get(name, default)) for name, default in _ENVIRONMENT)
    place = _choose_device(device, local)
    if world == 1:
        yield Ranks(device=place)
        return
    if place.type == "cuda":
        torch.cuda.set_device(place)
    # `DistributedDataParallel` imports it; imported later, it would keep the group for ever
    importlib.import_module("torch._dynamo")
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield Ranks(rank=dist.get_rank(), world=world, device=place)
    finally:
        # the threads of gloo end with the last reference to the group, which is in the cycles of
        # a wrapped model; one that wakes up while Python finalizes aborts the process
        gc.collect()
        dist.destroy_process_group()


# What torchrun sets, and what holds without it.
_ENVIRONMENT = (("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def _choose_device(device: str, local: int) -> torch.device:
    """Device of a local rank."""
    if device not in {"auto", "cpu", "cuda"}:
        msg = f"there is no device {device!r}; choose one of auto, cpu, cuda"
        raise ValueError(msg)
    if device == "cuda" and not torch.cuda.is_available():
        msg = "there is no CUDA device here; give --device cpu"
        raise ValueError(msg)
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local)
