"""The health of a run: rules over the figures of its steps. No torch, nothing is printed.

`table` lists the rules with the names that people know; `losses`, `gradients`, `updates` and
`steps` hold what they ask, `checkup` asks them all, `course` is what they look at, `limits` every
threshold and its reason.
"""

from nanhunt.health.checkup import Checkup, check, examine
from nanhunt.health.course import without_nonfinite
from nanhunt.health.limits import LIMITS, Limits
from nanhunt.health.symptom import Symptom
from nanhunt.health.table import BY_SLUG, RULES, Rule

__all__ = [
    "BY_SLUG", "LIMITS", "RULES", "Checkup", "Limits", "Rule", "Symptom", "check", "examine",
    "without_nonfinite",
]  # fmt: skip
