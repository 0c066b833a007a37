"""Gradient norms of a state that was found good: a small file that people review."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nanhunt.errors import StoreError
from nanhunt.records import Report

SCHEMA = 1
AGAIN = "write it anew with `nanhunt gate --update-baseline`"


@dataclass(frozen=True, slots=True)
class Baseline:
    """Case -> variant -> group of parameters -> norm of its gradients."""

    norms: Mapping[str, Mapping[str, Mapping[str, float]]]

    @classmethod
    def of(cls, reports: Iterable[tuple[str, Report]]) -> "Baseline":
        """The norms of every finite run as given; three digits, which is what a factor needs."""
        return cls(
            {
                case: {
                    run.variant: {g.name: float(f"{g.norm:.3g}") for g in run.groups}
                    for run in report.runs
                    if run.is_finite and not run.ablated
                }
                for case, report in reports
            }
        )

    def updated(self, newer: "Baseline") -> "Baseline":
        """This one with the cases of a newer one in their place."""
        return Baseline({**self.norms, **newer.norms})

    def dump(self) -> str:
        """The file's text: sorted, so that a review shows what changed and nothing else."""
        body = {"schema": SCHEMA, "gradient_norms": self.norms}
        return json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def parse(cls, text: str, origin: str) -> "Baseline":
        """Read what `dump` wrote.

        Raises:
            StoreError: it is something else.
        """
        try:
            body = json.loads(text)
        except ValueError as error:
            raise StoreError(f"{origin}: not JSON ({error}); {AGAIN}") from None
        if not isinstance(body, dict) or body.get("schema") != SCHEMA:
            raise StoreError(f"{origin}: no baseline of schema {SCHEMA}; {AGAIN}")
        norms: Any = body.get("gradient_norms")
        if not _fits(norms, 3):
            raise StoreError(
                f"{origin}: gradient_norms is to be case → variant → group → number; {AGAIN}"
            )
        return cls(norms)


def _fits(value: Any, depth: int) -> bool:
    if depth == 0:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and math.isfinite(value)
    return isinstance(value, dict) and all(_fits(inner, depth - 1) for inner in value.values())
