"""Which causes an op is known for, so that an op can be looked up as well as a slug."""

from collections.abc import Iterable, Mapping

from nanhunt.causes.circumstance import (
    AVERAGES,
    DIVISIONS,
    DOMAINS,
    EXPONENTIALS,
    NORMALISATIONS,
    POLES,
    SOFTMAXES,
    SOLVERS,
    STEEP,
    base_name,
)
from nanhunt.causes.table import CAUSES, Cause

_KNOWN_FOR: Mapping[str, Iterable[str]] = {
    "domain_error": DOMAINS,
    "pole": POLES,
    "cancellation": ("log", "sqrt", "div", "acos", "pow"),
    "underflow_to_zero": ("log", "div", "softmax", "exp", "prod", "cumprod"),
    "infinite_derivative_at_boundary": STEEP,
    "masked_branch_backward": (*STEEP, "div", "where", "clamp", "exp"),
    "zero_denominator_forward": (*DIVISIONS, *NORMALISATIONS),
    "zero_denominator_in_backward": DIVISIONS,
    "overflow_exp": EXPONENTIALS,
    "overflow_low_precision": ("mm", "bmm", "addmm", "mul", "pow", "sum", "exp", "to_copy"),
    "overflow_fp32": ("pow", "mul", "prod", "cumprod", "mm", "addmm"),
    "fully_masked_reduction": (*SOFTMAXES, "sub"),
    "empty_reduction": (*AVERAGES, "segment_reduce", "div", "nll_loss_forward", "cross_entropy"),
    "singular_matrix": (*SOLVERS, "solve", "inv", "inverse", "det", "slogdet", "cholesky"),
    "degenerate_decomposition": (
        "linalg_eigh",
        "linalg_svd",
        "linalg_eig",
        "linalg_qr",
        "eigh",
        "svd",
    ),
    "infeasible_target": ("ctc_loss", "gather", "nll_loss_forward"),
    "inf_minus_inf_or_zero_times_inf": ("mul", "sub", "masked_fill", "log", "logsumexp"),
    "optimizer_arithmetic": ("addcdiv", "foreach_addcdiv"),
    "eps_underflow_low_precision": (
        *("addcdiv", "clamp_min", "clamp", "rsqrt", "div", "log", "sqrt", "acos", "atanh"),
    ),
    "gradient_accumulation_overflow": ("add",),
}


def causes_of(op: str) -> tuple[Cause, ...]:
    """The rows that an op is known for, in the order of the table."""
    base = base_name(op)
    slugs = {slug for slug, ops in _KNOWN_FOR.items() if base in ops}
    return tuple(cause for cause in CAUSES if cause.slug in slugs)
