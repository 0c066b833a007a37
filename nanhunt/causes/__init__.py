"""Known causes: what each matches, why it happens, and what may cure it.

Rows are tried in order and the first match names the cause; where none matches the finding has no
cause and the operands speak for themselves. A row sees only a `Circumstance`: what was measured.
`docs/causes.md` has one section for each slug.
"""

from nanhunt.causes.by_op import causes_of
from nanhunt.causes.circumstance import (
    PICKS,
    Circumstance,
    base_name,
    is_collective,
    matrices_or_samples,
)
from nanhunt.causes.lineage import is_difference
from nanhunt.causes.sentences import figure
from nanhunt.causes.table import CAUSES, Cause

__all__ = [
    "CAUSES",
    "PICKS",
    "Cause",
    "Circumstance",
    "base_name",
    "causes_of",
    "figure",
    "is_collective",
    "is_difference",
    "known_cause",
    "matrices_or_samples",
]


def known_cause(circumstance: Circumstance) -> Cause | None:
    """The first row that matches; None when no known cause does."""
    return next((cause for cause in CAUSES if cause.matches(circumstance)), None)
