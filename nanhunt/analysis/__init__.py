"""From what was measured to what follows: pure functions over records, without torch.

`walk` goes back from the non-finite sinks to the op that made the value, `finding` says what, where
and why, `comparison` sets runs and ablations side by side, `diagnosis` answers the questions that
people ask of a NaN, `difference` compares two reports, `ranks` makes one of several processes'.
"""

from nanhunt.analysis.comparison import (
    confusable_names,
    describe_nonfinite,
    judge_ablation,
    judge_precision,
    vector_use,
)
from nanhunt.analysis.diagnosis import Case, diagnose
from nanhunt.analysis.difference import compare
from nanhunt.analysis.finding import Suspect, explain, find_culprits, find_suspects
from nanhunt.analysis.harmless import tell_harmless
from nanhunt.analysis.modules import summarise_modules
from nanhunt.analysis.ranks import merge_ranks
from nanhunt.analysis.walk import is_cured

__all__ = [
    "Case",
    "Suspect",
    "compare",
    "confusable_names",
    "describe_nonfinite",
    "diagnose",
    "explain",
    "find_culprits",
    "find_suspects",
    "is_cured",
    "judge_ablation",
    "judge_precision",
    "merge_ranks",
    "summarise_modules",
    "tell_harmless",
    "vector_use",
]
