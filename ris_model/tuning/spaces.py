"""Spaces: what a search may change, and how far; data, not code.

A row changes fields of a configuration by their paths. What must fit together is one choice or
moves in steps that fit, so that no drawn configuration is impossible.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

from ris_model.config import Config, Profile

Kind = TypeVar("Kind")
Extent = Literal["wide", "narrow"]


class Draws(Protocol):
    """Whoever chooses values: a trial of Optuna."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A real number."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1) -> int:
        """A whole number."""

    def suggest_categorical(self, name: str, choices: list[str]) -> Any:
        """One of some names."""


@dataclass(frozen=True, slots=True)
class Real:
    """A real field between two bounds."""

    path: str
    low: float
    high: float
    log: bool = True

    def draw(self, trial: Draws) -> dict[str, Any]:
        """Choose a value; return it by its path."""
        return {self.path: trial.suggest_float(self.path, self.low, self.high, log=self.log)}


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole field between two bounds, in steps."""

    path: str
    low: int
    high: int
    step: int = 1

    def draw(self, trial: Draws) -> dict[str, Any]:
        """Choose a value; return it by its path."""
        return {self.path: trial.suggest_int(self.path, self.low, self.high, step=self.step)}


@dataclass(frozen=True, slots=True)
class Choice:
    """Fields that change together: one of some named settings."""

    name: str
    settings: Mapping[str, Mapping[str, Any]]  # label -> path -> value

    def draw(self, trial: Draws) -> dict[str, Any]:
        """Choose a setting; return its values by their paths."""
        return dict(self.settings[trial.suggest_categorical(self.name, list(self.settings))])


Row = Real | Whole | Choice

# Attention splits the width evenly among its heads.
_SHAPES = Choice(
    "network.shape",
    {
        f"{width} by {heads}": {"network.width": width, "network.heads": heads}
        for width, heads in ((384, 6), (448, 7), (448, 8), (512, 8))
    },
)
# The detector's channels are normalised in groups of 8.
SPACES: dict[Profile, dict[Extent, tuple[Row, ...]]] = {
    "sound": {
        "wide": (
            Real("training.learning_rate", 3e-4, 1e-2),
            Real("training.head_factor", 0.25, 4.0),
            Real("training.weight_decay", 1e-6, 1e-2),
            Whole("training.batch_size", 32, 128, 32),
            Real("training.average_decay", 0.95, 0.998, log=False),
            Whole("detector.channels", 16, 64, 8),
            Whole("detector.blocks", 2, 6),
            Real("detector.capon_loading", 0.05, 1.0),
            Real("weights.lam_K", 0.05, 1.0),
            Real("weights.lam_offset", 0.3, 3.0),
            Real("weights.lam_aux", 0.01, 0.5),
            Real("weights.lam_cov", 0.02, 0.5),
        ),
        "narrow": (
            Real("training.learning_rate", 1e-3, 4e-3),
            Whole("training.batch_size", 48, 96, 16),
            Whole("detector.blocks", 3, 5),
            Real("weights.lam_K", 0.2, 0.8),
            Real("weights.lam_offset", 0.6, 1.6),
        ),
    },
    "incident": {
        "wide": (
            _SHAPES,
            Real("network.dropout", 0.20, 0.32, log=False),
            Real("network.temperature", 0.15, 0.25, log=False),
            Real("training.learning_rate", 1e-4, 4e-4),
            Whole("training.batch_size", 64, 80, 16),
            Real("weights.lam_cov", 0.10, 0.25, log=False),
            Real("weights.lam_K", 0.05, 0.25, log=False),
            Real("covariance.shrink_base", 0.10, 0.20, log=False),
        ),
        "narrow": (
            Real("network.dropout", 0.20, 0.26, log=False),
            Real("training.learning_rate", 2e-4, 4e-4),
            Real("weights.lam_K", 0.10, 0.25, log=False),
        ),
    },
}


def choose_space(profile: Profile, extent: str) -> tuple[Row, ...]:
    """Return the rows of a space; a ValueError lists what there is."""
    for known, rows in SPACES[profile].items():
        if known == extent:
            return rows
    msg = f"there is no space {extent!r}; choose one of {', '.join(SPACES[profile])}"
    raise ValueError(msg)


def draw_config(config: Config, rows: tuple[Row, ...], trial: Draws) -> Config:
    """Return the configuration with what a trial chooses."""
    for row in rows:
        for path, value in row.draw(trial).items():
            config = change_field(config, path, value)
    return config


def change_field(record: Kind, path: str, value: Any) -> Kind:
    """Return a frozen record with one field, reached by a dotted path, changed."""
    name, _, rest = path.partition(".")
    held = change_field(getattr(record, name), rest, value) if rest else value
    changed: Kind = replace(record, **{name: held})  # type: ignore[type-var]
    return changed
