"""The gate: reports and a policy in, a verdict out. No torch, nothing is printed.

`table` lists the checks, `policy` what a configuration says, `reading` how it is read. `checks`
names the function of each check: `finite`, `objective`, `norms` and `precision` hold them, `case`
is what they look at. `baseline` are the gradient norms of an earlier state; `verdict` puts it all
together and applies what is allowed.
"""

from nanhunt.gate.baseline import Baseline
from nanhunt.gate.policy import Allowance, Gated, Limits, Policy
from nanhunt.gate.reading import find_policy, read_policy
from nanhunt.gate.table import CHECKS, Check
from nanhunt.gate.verdict import judge

__all__ = [
    "CHECKS",
    "Allowance",
    "Baseline",
    "Check",
    "Gated",
    "Limits",
    "Policy",
    "find_policy",
    "judge",
    "read_policy",
]
