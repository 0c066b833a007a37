"""From what was measured to what follows: pure functions over records, without torch.

`walk` goes back from the non-finite sinks to the op that made the value, `finding` says what, where
and why, `comparison` sets runs and ablations side by side.
"""

from nanhunt.analysis.comparison import (
    confusable_names,
    describe_nonfinite,
    judge_ablation,
    judge_precision,
    vector_use,
)
from nanhunt.analysis.finding import find_culprits

__all__ = [
    "confusable_names",
    "describe_nonfinite",
    "find_culprits",
    "judge_ablation",
    "judge_precision",
    "vector_use",
]
