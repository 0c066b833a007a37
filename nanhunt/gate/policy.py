"""What a configuration asks of a gate."""

import datetime as dt
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from nanhunt.records import Checked

# Those of a hunt: `nanhunt.variants.DEFAULT`, which this side of the house cannot import.
VARIANTS = ("native", "fp64", "fp32", "amp-fp16-net", "amp-bf16-net")
Bounds = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of gradient norms and of what may differ.

    `norm` holds for every group that `norms` does not name; `ratio` is how many times larger one
    group's norm may be than another's, `ratios` are bounds of single ones.
    """

    norm: Bounds | None = None
    norms: Mapping[str, Bounds] = field(default_factory=dict)
    ratio: float = math.inf
    ratios: Mapping[tuple[str, str], Bounds] = field(default_factory=dict)
    baseline_factor: float = 10.0
    fp64: float = 1e-3

    @property
    def has_bounds(self) -> bool:
        """Whether anything bounds the norms themselves."""
        return bool(self.norm or self.norms or self.ratios) or self.ratio < math.inf


@dataclass(frozen=True, slots=True)
class Gated:
    """One subject, and all that is to be replayed of it; `line` is where it was asked for."""

    subject: str
    options: Mapping[str, Any] = field(default_factory=dict)
    batches: tuple[int, ...] = (0,)
    seeds: tuple[int, ...] = (0,)
    variants: tuple[str, ...] = VARIANTS
    ablations: tuple[str, ...] = ()
    device: str = "cpu"
    weights: Mapping[str, float] = field(default_factory=dict)
    limits: Limits = Limits()
    line: int = 1

    @property
    def title(self) -> str:
        """The subject with its options."""
        return " ".join([self.subject, *(f"{k}={v}" for k, v in self.options.items())])

    def case(self, batch: int, seed: int) -> str:
        """What one batch under one seed is called."""
        return f"{self.title} · batch {batch} · seed {seed}"


@dataclass(frozen=True, slots=True)
class Allowance:
    """A finding that is known and let through until a day; the words may hold `*` and `?`."""

    check: str
    reason: str
    until: dt.date
    name: str = "*"
    subject: str = "*"
    variant: str = "*"
    line: int = 1

    def covers(self, one: Checked) -> bool:
        """Whether a finding is the one that is meant."""
        subject = one.case.partition(" · ")[0]
        return (
            self.check == one.check
            and fnmatchcase(one.name, self.name)
            and fnmatchcase(one.variant, self.variant)
            and (fnmatchcase(subject, self.subject) or subject.split()[:1] == [self.subject])
        )


@dataclass(frozen=True, slots=True)
class Policy:
    """A whole configuration; `required` are checks that may not be left out."""

    file: Path
    subjects: tuple[Gated, ...]
    allowances: tuple[Allowance, ...] = ()
    required: tuple[str, ...] = ()
    baseline: str | None = None

    @property
    def root(self) -> Path:
        """The folder from which everything is named."""
        return self.file.parent
