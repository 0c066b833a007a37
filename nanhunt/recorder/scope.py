"""What a recorder is to do besides naming the ops and following non-finite values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Execute: TypeAlias = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class Scope:
    """What a recorder does besides naming the ops and following non-finite values.

    With `modules` it measures what passes each module, in both directions; with `shapes` it notes
    inputs and outputs of every op, and not only of those that met a non-finite value. `repair`
    are the indices of events whose newborn elements are replaced by finite numbers at birth. With
    `keep`, so many bytes of what the ops were given and returned are kept, the latest.
    """

    modules: bool = False
    shapes: bool = False
    repair: frozenset[int] = frozenset()
    keep: int = 0


PLAIN = Scope()  # nothing besides
