"""How a number came to be 0, 1 or negative, read off the chain of ops that made it."""

from collections.abc import Sequence
from math import inf
from typing import Literal

from nanhunt.causes.circumstance import Circumstance, base_name
from nanhunt.records import Ancestor, Inquiry

Making = Literal["guard", "difference", "underflow", "given", "exact"]

# Where functions have poles and edges, and what an eps is to keep a number away from.
EDGES = (0.0, 1.0, -1.0)
_DIFFERENCES = ("sub", "rsub", "add", "addcmul", "baddbmm", "addmm")
_CLAMPS = ("clamp", "clamp_min", "clamp_max")
_SMALL = 0.01  # an eps is smaller
# What makes 0 of numbers that are not 0 where the result is too small for the dtype.
_UNDERFLOW = (
    "exp", "exp2", "sigmoid", "softmax", "safe_softmax", "mul", "pow", "square", "prod", "cumprod",
    "div", "reciprocal", "erfc", "special_erfcx", "softplus", "logaddexp", "to_copy", "copy",
)  # fmt: skip
_CONSTANTS = ("zeros", "zeros_like", "new_zeros", "full", "full_like", "scalar_tensor", "zero")
# A threshold at which a program sets small numbers to 0 by hand.
_TINY = 1e-6


def lost_guard(chain: Sequence[Ancestor]) -> Ancestor | None:
    """The op whose guard (an eps that it adds, a bound that it keeps) rounding took away."""
    for ancestor in chain:
        base, scalars = base_name(ancestor.op), dict(ancestor.scalars)
        operands = dict(ancestor.operands)
        is_eps = 0 < abs(scalars.get("other", 0.0)) < _SMALL
        # In place the op overwrote what it was given; a 0 is then all that tells.
        is_lost = ancestor.value == operands.get("self", 0.0)
        if base == "add" and is_eps and is_lost and ancestor.value in EDGES:
            return ancestor
        bounds = {**operands, **scalars}
        low, high = bounds.get("min", -inf), bounds.get("max", inf)
        if base in _CLAMPS and not low <= ancestor.value <= high:
            return ancestor
    return None


def making(chain: Sequence[Ancestor]) -> Making:
    """How the number at the near end of a chain was made at its far end."""
    if lost_guard(chain) is not None:
        return "guard"
    if not chain:
        return "exact"
    if _flushed(chain) is not None:
        return "underflow"
    maker = chain[-1]
    if not maker.op:
        return "given"
    base = base_name(maker.op)
    numbers = [number for _, number in maker.operands]
    if base in _DIFFERENCES:
        terms = [*numbers, *(v for n, v in maker.scalars if n == "other")]
        return "difference" if any(terms) else "exact"
    factors = [*numbers, *(value for name, value in maker.scalars if name == "other")]
    is_positive = bool(numbers) and all(n != 0 and n - n == 0 for n in factors)
    is_underflow = maker.value == 0 and base in _UNDERFLOW and is_positive
    return "underflow" if is_underflow else "exact"


def _flushed(chain: Sequence[Ancestor]) -> Ancestor | None:
    """The choice by which a program set a tiny number to 0 by hand, as hardware may do."""
    for ancestor, chosen in zip(chain, (*chain[1:], None), strict=True):
        is_choice = base_name(ancestor.op) == "where" and ancestor.value == 0
        is_constant = chosen is not None and base_name(chosen.op) in _CONSTANTS
        if is_choice and is_constant and any(0 < abs(n) < _TINY for _, n in ancestor.operands):
            return ancestor
    return None


def made(c: Circumstance, kind: Making) -> Ancestor | None:
    """The op that made a critical operand of a culprit in this way, if one did."""
    for role, chain in c.inquiry.lineage:
        if chain and making(chain) == kind and is_critical(chain[0].value, role, c):
            flushed = _flushed(chain) or chain[-1]
            return lost_guard(chain) if kind == "guard" else flushed
    return None


def is_critical(value: float, role: str, c: Circumstance) -> bool:
    """Whether an op can fail at such an operand: a 0, a ±1, or a negative one."""
    if c.phase == "forward" and c.formula in ("div", "addcdiv") and role in ("self", "input"):
        return False  # the dividend
    if value in EDGES:
        return True
    return value < 0 and c.phase == "forward" and c.base in _NEEDS_POSITIVE


_NEEDS_POSITIVE = ("log", "log2", "log10", "sqrt", "rsqrt", "pow", "log1p", "acosh")


def is_difference(inquiry: Inquiry) -> bool:
    """Whether some operand was made by a difference, so that FP64 is worth a replay."""
    return any(making(chain) == "difference" for _, chain in inquiry.lineage if chain)
