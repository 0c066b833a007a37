"""What is known of non-finite values: who left them in a storage, and what of them an op met."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from nanhunt import measurement
from nanhunt.recorder.regions import Region, region_of
from nanhunt.records import Birth, TensorFacts


class Part(NamedTuple):
    """Who left non-finite elements in one region of a storage, and whether they were asked for."""

    source: int
    asked: bool
    region: Region


class Poison(NamedTuple):
    """The regions of one storage that were left with non-finite elements.

    `counted` are the facts of the views of it that were counted since it was last written to.
    `memory` is a weak reference: while it lives no other storage gets the same identity.
    """

    parts: tuple[Part, ...]
    counted: dict[tuple[object, ...], TensorFacts]
    memory: object

    @property
    def sources(self) -> tuple[int, ...]:
        """Who left the non-finite elements."""
        return tuple(dict.fromkeys(part.source for part in self.parts))

    @property
    def asked(self) -> bool:
        """Whether all of them were asked for."""
        return all(part.asked for part in self.parts)

    def seen_by(self, tensor: Tensor) -> "Poison":
        """What a view of the storage sees of it."""
        if len(self.parts) == 1:
            return self
        region = region_of(tensor)
        parts = tuple(part for part in self.parts if part.region.meets(region))
        return self._replace(parts=parts or self.parts)

    def without(self, tensor: Tensor) -> "Poison":
        """What is left after all of a view was written to."""
        region = region_of(tensor)
        return self._replace(
            parts=tuple(part for part in self.parts if not part.region.is_within(region))
        )


@dataclass(slots=True)
class Met:
    """What one op did with non-finite values: the part of its record that is usually absent."""

    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]
    sources: tuple[tuple[int, ...], ...]
    birth: Birth | None = None
    asked: bool = False


@dataclass(slots=True)
class Given:
    """The inputs of one op as they were before it ran; None where nothing had to be looked at.

    `masks` holds, by position, where an input that the op overwrites was not finite.
    """

    tensors: list[Tensor]
    facts: list[TensorFacts | None]
    poisons: list[Poison | None]
    masks: dict[int, Tensor]

    @property
    def poisoned(self) -> list[tuple[Poison, TensorFacts]]:
        """The inputs that really held a non-finite element."""
        return [
            (poison, facts)
            for poison, facts in zip(self.poisons, self.facts, strict=True)
            if poison is not None and facts is not None and not facts.is_finite
        ]

    @property
    def is_asked(self) -> bool:
        """Whether every non-finite input was asked for (True when there is none)."""
        return all(poison.asked for poison, _ in self.poisoned)

    @property
    def has_nan(self) -> bool:
        """Whether an input held a NaN."""
        return any(facts.nan for _, facts in self.poisoned)

    def nonfinite_masks(self) -> list[Tensor]:
        """Where the inputs that held a non-finite element held one."""
        return [
            self.masks[position] if position in self.masks else measurement.nonfinite_mask(tensor)
            for position, (tensor, facts) in enumerate(zip(self.tensors, self.facts, strict=True))
            if facts is not None and not facts.is_finite
        ]

    def without(self, is_meant: Callable[[Poison], bool]) -> "Given":
        """What is given besides the inputs of which some tell who left them non-finite."""
        left = [poison is None or not is_meant(poison) for poison in self.poisons]
        return replace(
            self,
            facts=[f if stays else None for f, stays in zip(self.facts, left, strict=True)],
            poisons=[p if stays else None for p, stays in zip(self.poisons, left, strict=True)],
        )

    def all_facts(self) -> tuple[TensorFacts, ...]:
        """Facts of every input; those not looked at are finite."""
        pairs = zip(self.tensors, self.facts, strict=True)
        return tuple(facts or shape_facts(tensor) for tensor, facts in pairs)

    def all_sources(self) -> tuple[tuple[int, ...], ...]:
        """For every input, who left its non-finite elements."""
        return tuple(
            poison.sources if poison and facts is not None and not facts.is_finite else ()
            for poison, facts in zip(self.poisons, self.facts, strict=True)
        )


def shape_facts(tensor: Tensor) -> TensorFacts:
    """Shape and dtype alone, for a tensor that is known to be finite."""
    return TensorFacts(tuple(tensor.shape), measurement.dtype_name(tensor.dtype))
