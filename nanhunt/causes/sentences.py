"""The sentences of the table: why it happened, with the numbers of the case filled in."""

from collections.abc import Callable
from math import isfinite

from nanhunt.causes.circumstance import (
    DOMAINS,
    LARGEST,
    STEEP,
    Circumstance,
    base_name,
    divides_by_zero,
    divisor_of,
    is_let_through,
    is_negative_power,
    is_negative_variance,
    matrices_or_samples,
)
from nanhunt.causes.lineage import made
from nanhunt.records import Ancestor, Operand


def figure(value: float) -> str:
    """A number in four digits, or in nine where four would put it on an edge beside which it is."""
    short = f"{value:.4g}"
    is_on_edge = abs(float(short)) == 1 and float(short) != value
    return f"{value:.9g}" if is_on_edge else short


def quote(operand: Operand | None) -> str:
    """The values of an operand at the offending elements, in brackets."""
    if operand is None or not operand.at:
        return ""
    values = dict.fromkeys(map(figure, operand.at))
    return f" ({', '.join(values)})"


def elements(c: Circumstance) -> str:
    """How many elements were born."""
    count = c.birth.count if c.birth else 0
    return f"{count} element{'' if count == 1 else 's'}"


def verb(c: Circumstance, stem: str) -> str:
    """A verb that agrees with the number of elements."""
    return f"{stem}s" if c.birth and c.birth.count == 1 else stem


def why_degenerate(c: Circumstance) -> str:
    """Ties among eigenvalues or singular values, or a singular R."""
    spectrum = c.birth.spectrum if c.birth else None
    what = "singular vectors" if "Svd" in (c.node or "") else "eigenvectors"
    values = "singular values" if "Svd" in (c.node or "") else "eigenvalues"
    if "Qr" in (c.node or ""):
        return (
            "The backward of QR solves with R, and R is singular: a column is zero or depends on "
            "the others."
        )
    if spectrum is None or not spectrum.tied:
        return (
            f"The loss uses {what}, and their backward divides by the differences of the {values}."
        )
    unit = matrices_or_samples(spectrum, c.samples)
    return (
        f"The loss uses {what}, and their backward divides by the differences of the {values}; in "
        f"{spectrum.tied} of {spectrum.matrices} {unit} two or more that the call returned are "
        f"bit-identical, so it computes 0/0."
    )


def why_domain(c: Circumstance) -> str:
    """An argument outside the domain."""
    argument, variance = c.operand("self"), c.operand("running_var")
    if is_negative_variance(c) and variance is not None:
        return (
            f"{c.base} takes the root of running_var + eps, and running_var is negative: "
            f"{variance.smallest:.4g} at the least. A variance is not: the buffer was spoiled "
            f"before."
        )
    function, whose = c.base, ""
    if c.phase == "backward":
        function, whose = c.formula, f"The backward of {c.base} takes a {c.formula}: "
    return (
        f"{whose}{function} is real only for {DOMAINS[function]}; {elements(c)} of its argument "
        f"{verb(c, 'lie')} outside{quote(argument)}."
    )


def why_pole(c: Circumstance) -> str:
    """An argument at a pole."""
    return f"{c.base} is infinite at its argument{quote(c.operand('self'))} in {elements(c)}."


def why_zero(c: Circumstance) -> str:
    """A division by exactly 0."""
    divisor = divisor_of(c)
    zeros = divisor.at_zero if divisor else 0
    kind = "0/0" if c.birth and c.birth.kind == "nan" else "a finite number by 0"
    is_own = c.phase == "backward" and not c.is_hook
    where = "the formula of its backward divides" if is_own else "it divides"
    if is_negative_power(c):
        return f"In {elements(c)} it raises 0 to a negative power, which divides by 0."
    if divisor is None:
        return f"In {elements(c)} {where} {kind}: the divisor is the plain number 0."
    share = "there" if c.birth and c.birth.count == zeros == 1 else f"in {zeros} of them"
    return f"In {elements(c)} {where} {kind}: the divisor is exactly 0 {share}."


def why_infinite(c: Circumstance) -> str:
    """What an infinity that was let stand came to."""
    if is_let_through(c):
        return "An infinity that the program wrote down reaches the loss: nothing leaves it out."
    return "An infinity that was let stand meets 0 or another infinity here, which is NaN."


def why_update(c: Circumstance) -> str:
    """What comes after the backward, made of finite gradients."""
    detail = f" {why_zero(c)}" if divides_by_zero(c) else ""
    odd = [(name, v) for name, v in (c.birth.scalars if c.birth else ()) if not isfinite(v)]
    detail += "".join(f" It is given {name} = {value:g}." for name, value in odd)
    return f"Gradients are finite; the update that comes after them makes the value itself.{detail}"


def why_steep(c: Circumstance) -> str:
    """An infinite slope."""
    return (
        f"The derivative of {c.base} is infinite at {STEEP[c.base]}, and {elements(c)} of its "
        f"argument {verb(c, 'stand')} exactly there."
    )


def why_masked(c: Circumstance) -> str:
    """A branch that only the forward leaves out."""
    if c.birth is None:
        left = "NaN" if c.is_kept_nan else "an infinity"
        return (
            f"The backward of {c.base} meets {left} that the forward had left and masked out "
            f"afterwards: the gradient that arrives there is exactly 0, and 0 times that is NaN."
        )
    return (
        f"The branch is masked out afterwards, so the gradient that arrives at {elements(c)} is "
        f"exactly 0; the derivative of {c.base} is not finite there, and 0 times that is NaN."
    )


def why_low(c: Circumstance) -> str:
    """A result beyond a half precision."""
    limit = LARGEST[c.dtype]
    return (
        f"The result does not fit {c.dtype}, whose largest number is {limit:g}; it became infinite "
        f"in {elements(c)}."
    )


def why_exp(c: Circumstance) -> str:
    """An exponential beyond the dtype."""
    argument = c.operand("self")
    return f"{c.base} of{quote(argument) or ' a large number'} does not fit {c.dtype}."


def why_row(c: Circumstance) -> str:
    """A row without any entry."""
    return (
        f"Every entry of a row is -inf, as a mask has it, and {c.base} of such a row is "
        f"NaN ({elements(c)})."
    )


def fixed(sentence: str) -> Callable[[Circumstance], str]:
    """A sentence without numbers."""
    return lambda _: sentence


# -- how a critical operand came to be -------------------------------------------------------------


def _maker(ancestor: Ancestor | None) -> str:
    return base_name(ancestor.op) if ancestor else "an op"


def why_guard(c: Circumstance) -> str:
    """The eps or the bound did not survive the dtype."""
    lost = made(c, "guard")
    if lost is None:
        return f"The eps that guards the division is not representable in {c.dtype}."
    given = (*lost.scalars, *lost.operands)
    guards = [f"{name} = {value:g}" for name, value in given if value and name != "self"]
    return (
        f"The guard is lost to rounding: {_maker(lost)} with {', '.join(guards)} returned "
        f"{lost.value:g}, since {lost.dtype} has no such number there; {c.base} then meets exactly "
        f"that value."
    )


def why_underflow(c: Circumstance) -> str:
    """A positive number became 0."""
    maker = made(c, "underflow")
    given = [f"{v:.4g}" for _, v in maker.operands] if maker else []
    what = "divides by it" if divides_by_zero(c) else f"takes its {c.base}"
    by = "A cast" if maker and base_name(maker.op) in ("to_copy", "copy") else _maker(maker)
    return (
        f"{by} of {', '.join(given) or 'positive numbers'} is too small for "
        f"{maker.dtype if maker else c.dtype} and became exactly 0; the program then {what} "
        f"({elements(c)})."
    )


def why_cancelled(c: Circumstance) -> str:
    """A difference lost all its digits."""
    maker = made(c, "difference")
    given = [f"{v:.9g}" for _, v in (*maker.operands, *maker.scalars)] if maker else []
    return (
        f"{_maker(maker)} of {' and '.join(given) or 'nearly equal numbers'} left "
        f"{maker.value if maker else 0:.4g}: the digits in which they differ were rounded away. In "
        f"FP64 the step is finite (replayed)."
    )


def why_growth(c: Circumstance) -> str:
    """The parameters ran away."""
    return (
        f"The parameters grew {c.inquiry.growth:.3g} times since the first step, until {c.base} "
        f"left the range of {c.dtype}; it shows late, and the learning rate was too large from the "
        f"start."
    )


def why_given(c: Circumstance) -> str:
    """It was there before."""
    if c.op == "gradient":
        return (
            "The gradient was there before the backward began: an earlier one left it in .grad and "
            "nobody zeroed it, or it was handed to backward()."
        )
    return "The value was there before the step began; no operation of the step made it."


def why_empty(c: Circumstance) -> str:
    """Too few elements."""
    of = c.operand("self", "input")
    if c.base.startswith("nll_loss"):
        return "Every target is ignored, so the mean is over no element at all: 0/0."
    if c.base == "div":
        return "A sum is divided by a count that is 0."
    if c.base == "segment_reduce":
        return f"The mean of a segment without any element is 0/0 ({elements(c)})."
    shape = list(of.facts.shape) if of else "[]"
    return f"{c.base} over {shape} has too few elements in {elements(c)} of its result: 0/0."


def why_normalised(c: Circumstance) -> str:
    """A normalisation of a constant without an eps."""
    if c.base == "weight_norm_interface":
        return "It divides by the norm of the weight, which is 0 here, and takes no eps."
    eps = dict(c.birth.scalars).get("eps", 0.0) if c.birth else 0.0
    return (
        f"{c.base} divides by the spread, which is 0 here, and eps = {eps:g} does not prevent it."
    )


def why_beyond(c: Circumstance) -> str:
    """A result beyond the dtype."""
    inside = f" (inside it, {base_name(c.inquiry.inner)})" if c.inquiry.inner else ""
    return f"Finite operands, and a result beyond the range of {c.dtype} in {elements(c)}{inside}."
