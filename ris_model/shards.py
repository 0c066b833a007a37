"""Shards: scenes on disk, written once, resumable, streamed in a seeded order.

A shard holds every tensor of its scenes but the two covariances, nine tenths of a batch, which
follow from the rest. What it was made from stands in its header: scenario, seed, split, place.

Shapes as in `data`: B scenes, N elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ris_model.config import Scenario, Split
from ris_model.covariance import estimate_samples
from ris_model.data import Batch, draw_batch, form_true
from ris_model.geometry import place_elements, steer
from ris_model.storage import hash_record, read_fields, read_record, read_tensors, write_tensors

# Of a batch, what is not written but formed again.
_DERIVED = ("r_true", "r_samp")
# Scenes that are drawn at a time: the covariances of more would not fit at full size.
_DRAWN = 64
# Shards that a stream holds in memory: a batch may end one and begin the next.
_HELD = 3
_FORM = "shard"


@dataclass(frozen=True, slots=True)
class Plan:
    """What the shards of a split are made from."""

    scenario: Scenario
    split: Split
    seed: int
    scenes: int  # in all shards together
    shard_size: int  # scenes of a shard; the last may have fewer

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.scenes // self.shard_size)

    def locate(self, folder: Path, index: int) -> Path:
        """Path of a shard."""
        return folder / f"{self.split}-{index:05d}.safetensors"

    def describe(self, index: int) -> dict[str, Any]:
        """Record of a shard."""
        left = self.scenes - index * self.shard_size
        return {
            "scenario": asdict(self.scenario),
            "hash": hash_record(self.scenario),
            "split": self.split,
            "seed": self.seed,
            "index": index,
            "shard_size": self.shard_size,
            "scenes": min(self.shard_size, left),
        }


def write_shards(plan: Plan, folder: Path) -> Iterator[tuple[Path, bool]]:
    """Write the shards of a plan that are not there yet; yield each with whether it is new.

    Every shard is a stream of its own, so an interrupted run goes on with the next one, and more
    scenes may be asked for later where the last shard is full.

    Raises:
        ValueError: for a shard that is broken or made from something else; it is not touched.
    """
    for index in range(plan.shards):
        path = plan.locate(folder, index)
        record = plan.describe(index)
        if path.exists():
            tensors, found = read_tensors(path, form=_FORM)
            refuse_foreign(path, found, record)
            del tensors
            yield path, False
            continue
        write_tensors(path, _draw_shard(plan, index), form=_FORM, record=record)
        yield path, True


def refuse_foreign(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise a ValueError that names the first thing in which a shard is another one."""
    for name, value in wanted.items():
        came = found.get(name)
        if came == value:
            continue
        if name == "scenario" and isinstance(came, dict):
            differing = {field for field in value if came.get(field) != value[field]}
            pairs = [(field, came.get(field), value[field]) for field in sorted(differing)]
        else:
            pairs = [(name, came, value)]
        for field, theirs, ours in pairs[:1]:
            msg = f"{path} is a foreign shard: its {field} is {theirs!r}, not {ours!r}"
            raise ValueError(msg)


class Stream:
    """Batches of a split from its shards, in an order that the seed decides.

    The order of an epoch is a permutation of the shards and, in each, of its scenes: a batch
    needs one or two shards, and batch `index` is the same whoever asks for it and whenever.
    """

    def __init__(
        self,
        folder: Path,
        split: Split,
        *,
        batch_size: int,
        seed: int = 0,
        scenario: Scenario | None = None,
    ) -> None:
        """Find the shards; `scenario` is what they have to be made from, when it is given.

        Raises:
            ValueError: when there are none, too few scenes, or broken or foreign ones.
        """
        self.paths = sorted(folder.glob(f"{split}-*.safetensors"))
        if not self.paths:
            msg = f"there is no shard of the split {split!r} in {folder}; make some with generate"
            raise ValueError(msg)
        records = [read_record(path, form=_FORM) for path in self.paths]
        for index, (path, record) in enumerate(zip(self.paths, records, strict=True)):
            same = {name: records[0][name] for name in ("scenario", "seed", "shard_size")}
            refuse_foreign(path, record, {**same, "split": split, "index": index})
            if scenario is not None:
                refuse_foreign(path, record, {"scenario": asdict(scenario)})
        self.scenario = read_fields(Scenario, records[0]["scenario"])
        self.sizes = [int(record["scenes"]) for record in records]
        self.batch_size, self.seed = batch_size, seed
        if self.batches == 0:
            msg = f"{folder} holds {sum(self.sizes)} scenes of {split!r}, less than one batch"
            raise ValueError(msg)
        self._read = lru_cache(maxsize=_HELD)(self._read_shard)

    @property
    def batches(self) -> int:
        """Whole batches of an epoch."""
        return sum(self.sizes) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        """Go once through the split."""
        return (self.take(index) for index in range(self.batches))

    def take(self, index: int, part: slice = slice(None), device: str = "cpu") -> Batch:
        """Return batch `index`; after the last one of an epoch comes the first of the next.

        Args:
            index: counts on through the epochs.
            part: of the scenes, for one of several processes.
            device: where the batch is put together.
        """
        epoch, place = divmod(index, self.batches)
        wanted = range(place * self.batch_size, (place + 1) * self.batch_size)[part]
        pieces: list[dict[str, torch.Tensor]] = []
        start = 0
        for shard, order in self._order(epoch):
            inside = order[max(0, wanted.start - start) : max(0, wanted.stop - start)]
            if len(inside):
                rows = torch.from_numpy(inside)
                pieces.append({n: t[rows].to(device) for n, t in self._read(shard).items()})
            start += len(order)
        joined = {n: torch.cat([piece[n] for piece in pieces]) for n in pieces[0]}
        return complete(joined, self.scenario)

    def _order(self, epoch: int) -> Iterator[tuple[int, np.ndarray[Any, np.dtype[np.int64]]]]:
        """Shards of an epoch, each with its scenes, in order."""
        rng = np.random.default_rng(np.random.SeedSequence((self.seed, epoch)))
        for shard in rng.permutation(len(self.paths)):
            yield int(shard), rng.permutation(self.sizes[shard])

    def _read_shard(self, shard: int) -> dict[str, torch.Tensor]:
        """Tensors of a shard."""
        return read_tensors(self.paths[shard], form=_FORM)[0]


def complete(tensors: dict[str, torch.Tensor], scenario: Scenario) -> Batch:
    """Form the covariances of scenes that were read: R_true from ptr and power, R_samp from y."""
    empty = tensors["y"].new_zeros(0)
    bare = Batch(**tensors, r_true=empty, r_samp=empty)
    positions = place_elements(scenario).to(bare.ptr)
    a_BKN = steer(positions, bare.points, wavenumber=scenario.wavenumber, model=scenario.steering)
    return Batch(
        **tensors,
        r_true=form_true(a_BKN, bare.power),
        r_samp=estimate_samples(bare.y, bare.h, codes=bare.codes),
    )


def _draw_shard(plan: Plan, index: int) -> dict[str, torch.Tensor]:
    """Draw the scenes of a shard."""
    scenes = plan.describe(index)["scenes"]
    per_shard = -(-plan.shard_size // _DRAWN)
    pieces = [
        draw_batch(
            plan.scenario,
            seed=plan.seed,
            split=plan.split,
            index=index * per_shard + number,
            size=min(_DRAWN, scenes - number * _DRAWN),
        )
        for number in range(-(-scenes // _DRAWN))
    ]
    names = [field.name for field in fields(Batch) if field.name not in _DERIVED]
    return {name: torch.cat([getattr(piece, name) for piece in pieces]) for name in names}
