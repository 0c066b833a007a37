"""Feeds: where the batches of a training come from, and this process's part of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from ris_model.config import Config
from ris_model.data import Batch, draw_batch
from ris_model.shards import Stream
from ris_model.training.ranks import Ranks

# Scenes that are validated at a time, whatever the size of a training batch.
_LOOKED_AT = 64


@dataclass(frozen=True, slots=True)
class Feeds:
    """Batches by number; all on the device of the process."""

    train: Callable[[int], Batch]  # step -> this process's part of its batch
    validation: Callable[[], list[Batch]]  # this process's part of the validation scenes


def draw_feeds(config: Config, *, seed: int, ranks: Ranks) -> Feeds:
    """Draw every scene when it is needed: step n has batch n of the training split.

    Every process draws the whole batch and takes its part, so that the scenes do not depend on
    the number of processes. With many of them, or a fast device, write shards.
    """
    size = config.training.batch_size
    part = ranks.take_share(size)

    def train(step: int) -> Batch:
        batch = draw_batch(
            config.training_scenario, seed=seed, split="train", index=step, size=size
        )
        return take_part(batch, part, ranks.device)

    return Feeds(train=train, validation=_draw_validation(config, seed=seed, ranks=ranks))


def read_feeds(config: Config, folder: Path, *, seed: int, ranks: Ranks) -> Feeds:
    """Read the scenes from shards; those of the validation are drawn where there are none.

    Raises:
        ValueError: when there are no training shards, or broken or foreign ones.
    """
    world, size, device = config.training_scenario, config.training.batch_size, str(ranks.device)
    stream = Stream(folder, "train", batch_size=size, seed=seed, scenario=world)
    part = ranks.take_share(size)

    def train(step: int) -> Batch:
        return stream.take(step, part, device)

    if not list(folder.glob("val-*")):
        return Feeds(train=train, validation=_draw_validation(config, seed=seed, ranks=ranks))
    wanted = min(_LOOKED_AT, config.training.validation_scenes)
    looked = Stream(folder, "val", batch_size=wanted, seed=seed, scenario=world)
    held: list[Batch] = []

    def validation() -> list[Batch]:
        count = min(looked.batches, config.training.validation_scenes // wanted)
        if not held:
            held.extend(
                looked.take(i, device=device) for i in range(ranks.rank, count, ranks.world)
            )
        return held

    return Feeds(train=train, validation=validation)


def take_part(batch: Batch, part: slice, device: torch.device) -> Batch:
    """Return some scenes of a batch on a device."""
    return Batch(**{f.name: getattr(batch, f.name)[part].to(device) for f in fields(Batch)})


def _draw_validation(config: Config, *, seed: int, ranks: Ranks) -> Callable[[], list[Batch]]:
    """Draw this process's validation batches once, when first asked for."""
    held: list[Batch] = []
    size = min(_LOOKED_AT, config.training.validation_scenes)
    count = config.training.validation_scenes // size

    def validation() -> list[Batch]:
        for index in range(ranks.rank, count, ranks.world) if not held else ():
            batch = draw_batch(
                config.training_scenario, seed=seed, split="val", index=index, size=size
            )
            held.append(take_part(batch, slice(None), ranks.device))
        return held

    return validation
