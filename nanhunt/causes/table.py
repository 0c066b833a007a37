"""The table of known causes, and the sentences that fill the numbers of a case in."""

from collections.abc import Callable
from dataclasses import dataclass

from nanhunt.causes.circumstance import (
    DOMAINS,
    EXPONENTIALS,
    HALF,
    LARGEST,
    SOFTMAXES,
    STEEP,
    Circumstance,
    divides_by_zero,
    divisor_of,
    is_at_pole,
    is_decomposition,
    is_incoming_zero,
    is_masked_afterwards,
    is_steep,
    matrices_or_samples,
    overflows,
)
from nanhunt.records import Operand


@dataclass(frozen=True, slots=True)
class Cause:
    """One row: a name, when it applies, one sentence of reason, and recipes by slug.

    `reason` fills the numbers of a case in; `about` explains the cause in general.
    """

    slug: str
    title: str
    about: str
    matches: Callable[[Circumstance], bool]
    reason: Callable[[Circumstance], str]
    recipes: tuple[str, ...] = ()


def _quote(operand: Operand | None) -> str:
    if operand is None or not operand.at:
        return ""
    values = dict.fromkeys(f"{value:.4g}" for value in operand.at)
    return f" ({', '.join(values)})"


def _elements(c: Circumstance) -> str:
    count = c.birth.count if c.birth else 0
    return f"{count} element{'' if count == 1 else 's'}"


def _verb(c: Circumstance, stem: str) -> str:
    return f"{stem}s" if c.birth and c.birth.count == 1 else stem


def _why_degenerate(c: Circumstance) -> str:
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


def _why_domain(c: Circumstance) -> str:
    argument = c.operand("self")
    return (
        f"{c.base} is real only for {DOMAINS[c.base]}; {_elements(c)} of its argument "
        f"{_verb(c, 'lie')} outside{_quote(argument)}."
    )


def _why_pole(c: Circumstance) -> str:
    return f"{c.base} is infinite at its argument{_quote(c.operand('self'))} in {_elements(c)}."


def _why_zero(c: Circumstance) -> str:
    divisor = divisor_of(c)
    zeros = divisor.at_zero if divisor else 0
    kind = "0/0" if c.birth and c.birth.kind == "nan" else "a finite number by 0"
    where = "the formula of its backward divides" if c.phase == "backward" else "it divides"
    return f"In {_elements(c)} {where} {kind}: the divisor is exactly 0 in {zeros} of them."


def _why_steep(c: Circumstance) -> str:
    return (
        f"The derivative of {c.base} is infinite at {STEEP[c.base]}, and {_elements(c)} of its "
        f"argument {_verb(c, 'stand')} exactly there."
    )


def _why_masked(c: Circumstance) -> str:
    return (
        f"The branch is masked out afterwards, so the gradient that arrives at {_elements(c)} is "
        f"exactly 0; the derivative of {c.base} is not finite there, and 0 times that is NaN."
    )


def _why_low(c: Circumstance) -> str:
    limit = LARGEST[c.dtype]
    return (
        f"The result does not fit {c.dtype}, whose largest number is {limit:g}; it became infinite "
        f"in {_elements(c)}."
    )


def _why_exp(c: Circumstance) -> str:
    argument = c.operand("self")
    return f"{c.base} of{_quote(argument) or ' a large number'} does not fit {c.dtype}."


def _why_row(c: Circumstance) -> str:
    return (
        f"Every entry of a row is -inf, as a mask has it, and {c.base} of such a row is "
        f"NaN ({_elements(c)})."
    )


def _fixed(sentence: str) -> Callable[[Circumstance], str]:
    return lambda _: sentence


CAUSES: tuple[Cause, ...] = (
    Cause(
        "bad_data",
        "A tensor was non-finite before the step",
        "An input, a buffer or a parameter holds NaN or an infinity when the step starts, so "
        "every operation that reads it passes it on. Look at where the tensor was made: the "
        "data, the checkpoint, an earlier step.",
        lambda c: c.phase == "data",
        _fixed("The value was there before the step began; no operation of the step made it."),
        ("validate_batch",),
    ),
    Cause(
        "custom_function_bug",
        "A custom autograd.Function returns a non-finite gradient",
        "The backward of a user's autograd.Function is Python like any other: a formula that "
        "overflows or divides by zero there is not covered by torch's own care. The report "
        "names the line inside it.",
        lambda c: c.phase == "backward" and c.op.startswith("custom:"),
        _fixed(
            "The backward that the user wrote for this autograd.Function returns a non-finite "
            "gradient for finite inputs."
        ),
    ),
    Cause(
        "gradient_accumulation_overflow",
        "Finite gradients whose sum is out of range",
        "Where a tensor is used several times the engine adds the gradients that come back. "
        "Each may fit the dtype and their sum not; in half precision that happens at 65504.",
        lambda c: c.birth is not None and c.birth.by_engine,
        _fixed("Each gradient is finite; the sum that the engine makes at the fan-out is not."),
        ("smaller_loss_scale", "upcast"),
    ),
    Cause(
        "degenerate_decomposition",
        "Gradient of vectors of a decomposition with repeated values",
        "The derivative of eigenvectors and singular vectors divides by the differences of "
        "eigenvalues or singular values. Two that are equal to the last bit give 0/0. More "
        "diagonal loading makes it worse, since it rounds the small ones to one number; more "
        "precision does not help either. With values only the backward never divides.",
        is_decomposition,
        _why_degenerate,
        ("gap_only_projector", "values_only", "detach_vectors"),
    ),
    Cause(
        "fully_masked_reduction",
        "Every entry of a row is -inf",
        "A softmax normalises by the sum of exponentials; over a row in which every entry is "
        "-inf that sum is 0, and the result is NaN. The mask is intended, the row without any "
        "entry is not.",
        lambda c: c.base in SOFTMAXES and c.birth is not None and c.birth.from_asked,
        _why_row,
        ("finfo_min_mask", "zero_empty_rows"),
    ),
    Cause(
        "optimizer_arithmetic",
        "The update rule divides by zero",
        "The update divides by the root of a running mean of squares plus eps. A parameter "
        "that never had a gradient has 0 there, and with eps = 0 the update is 0/0.",
        lambda c: c.phase == "optimizer" and c.dtype not in HALF,
        _fixed(
            "Gradients are finite; the update rule itself makes the value (its eps is too small)."
        ),
        ("optimizer_eps",),
    ),
    Cause(
        "masked_branch_backward",
        "The masked branch still has a backward",
        "torch.where, a mask or a clamp hides a branch in the forward only. Its backward "
        "still runs, with an incoming gradient of exactly 0, and 0 times an infinite "
        "derivative is NaN. The argument must be made safe before the function, not the "
        "result after it.",
        lambda c: c.phase == "backward" and is_incoming_zero(c) and is_masked_afterwards(c),
        _why_masked,
        ("double_where",),
    ),
    Cause(
        "infinite_derivative_at_boundary",
        "The derivative is infinite at the boundary",
        "The function is fine at the point, its slope is not: the square root at 0, the arc "
        "cosine at 1, a fractional power at 0. The gradient is infinite there, and becomes "
        "NaN at the next product with 0.",
        lambda c: is_steep(c) and c.birth is not None and "inf" in c.birth.kind,
        _why_steep,
        ("safe_argument", "clamp"),
    ),
    Cause(
        "zero_denominator_in_backward",
        "The backward formula divides by zero",
        "The forward is finite, or hides it; the formula of the backward divides by a number "
        "that is exactly 0.",
        lambda c: c.phase == "backward" and (divides_by_zero(c) or is_steep(c)),
        lambda c: _why_zero(c) if divides_by_zero(c) else _why_steep(c),
        ("safe_denominator", "double_where"),
    ),
    Cause(
        "zero_denominator_forward",
        "Division by an exact zero",
        "A division, a reciprocal or a normalisation by exactly 0 in the forward.",
        lambda c: c.phase == "forward" and divides_by_zero(c),
        _why_zero,
        ("safe_denominator",),
    ),
    Cause(
        "overflow_low_precision",
        "The result does not fit the half precision",
        "float16 ends at 65504 and bfloat16 has few digits; a result that float32 holds "
        "easily becomes infinite. In the forward the operation needs a wider dtype, in the "
        "backward a smaller loss scale may do.",
        lambda c: overflows(c, *HALF),
        _why_low,
        ("upcast", "smaller_loss_scale"),
    ),
    Cause(
        "overflow_exp",
        "An exponential overflows",
        "exp of a number above 88.7 does not fit float32 (709.8: float64). Most formulas with "
        "exp have a form that never needs the large number: logsumexp, softplus, log_softmax.",
        lambda c: c.formula in EXPONENTIALS and overflows(c, "float32", "float64"),
        _why_exp,
        ("stable_formulation", "clamp"),
    ),
    Cause(
        "pole",
        "The argument is a pole of the function",
        "The function is infinite at this very argument: log at 0, atanh at 1, lgamma at 0.",
        lambda c: c.phase == "forward" and is_at_pole(c),
        _why_pole,
        ("safe_argument",),
    ),
    Cause(
        "domain_error",
        "The argument is outside the domain",
        "The function has no real value for this argument: the log of a negative number, the "
        "arc cosine of 1.0000001. Rounding is often what pushed it over.",
        lambda c: (
            c.phase == "forward"
            and c.base in DOMAINS
            and c.birth is not None
            and "nan" in c.birth.kind
            and not c.birth.from_asked
        ),
        _why_domain,
        ("clamp", "safe_argument"),
    ),
    Cause(
        "inf_minus_inf_or_zero_times_inf",
        "An infinity meets 0 or another infinity",
        "An infinity that was let stand, as a mask or as the log of 0, meets a 0 in a product "
        "or another infinity in a difference.",
        lambda c: c.phase == "backward" if c.birth is None else c.birth.from_asked,
        _fixed("An infinity that was let stand meets 0 or another infinity here, which is NaN."),
        ("finite_constant",),
    ),
    Cause(
        "overflow_fp32",
        "The result does not fit the precision",
        "Repeated products, sums of squares or a recurrence grow until the dtype ends.",
        lambda c: overflows(c, "float32", "float64", "complex64", "complex128"),
        lambda c: f"Finite operands, and a result beyond the range of {c.dtype} in {_elements(c)}.",
        ("rescale", "fp64"),
    ),
)
