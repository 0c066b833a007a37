"""Counterfactuals on a culprit: one thing is changed, the step is replayed, is it finite now?

`calls` sees the calls of torch by the user's code and says which one an op was part of, `edits`
knows the small changes of a call, `formulas` the stable forms, `decompositions` gradients without
ties, `trying` runs a step with them, `wholes` changes the batch, the scale or the optimizer,
`bench` runs one trial and compares it, `lines` writes an edit into the user's line and `search`
decides what is tried.
"""

from nanhunt.trials.calls import CallMode
from nanhunt.trials.search import BUDGET, Lead, try_fixes

__all__ = ["BUDGET", "CallMode", "Lead", "try_fixes"]
