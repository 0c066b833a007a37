"""The table of known causes: what each matches, why it happens, and what may cure it.

Rows are tried in order and the first match names the cause; where none matches the finding has no
cause and the operands speak for themselves. A row sees only a `Circumstance`: what was measured.
`docs/causes.md` has one section for each slug.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nanhunt.records import Birth, Operand, Phase, Spectrum


@dataclass(frozen=True, slots=True)
class Circumstance:
    """What is known about a culprit when its cause is looked up.

    `op` is the forward op (for a backward fault: the origin), `formula_op` the op that returned
    the non-finite value. `after` names the autograd nodes that ran before the guilty one and whose
    forward ops came after it: what was done with its result. `samples` is the size of the batch.
    """

    phase: Phase
    op: str
    node: str | None
    formula_op: str
    dtype: str
    birth: Birth | None
    after: tuple[str, ...] = ()
    samples: int | None = None

    @property
    def base(self) -> str:
        """The op without namespace, leading underscores and the in-place mark."""
        return base_name(self.op)

    @property
    def formula(self) -> str:
        """The formula's op, in the same form."""
        return base_name(self.formula_op)

    def operand(self, *roles: str) -> Operand | None:
        """The first operand of the birth that has one of these roles."""
        operands = self.birth.operands if self.birth else ()
        return next((o for role in roles for o in operands if o.role == role), None)

    def argument(self) -> Operand | None:
        """The argument of the forward op: kept by the node, or given to the op itself."""
        if self.phase == "backward":
            return self.operand("saved self", "saved input", "saved result", "other")
        return self.operand("self", "input")


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


def base_name(op: str) -> str:
    """`aten::_linalg_eigh` and `aten::div_` as `linalg_eigh` and `div`."""
    return op.rsplit("::", maxsplit=1)[-1].strip("_")


def matrices_or_samples(spectrum: Spectrum, samples: int | None) -> str:
    """What to call the matrices of a decomposition: one per sample of the batch is a sample."""
    return "samples" if spectrum.matrices == samples else "matrices"


def known_cause(circumstance: Circumstance) -> Cause | None:
    """The first row that matches; None when no known cause does."""
    return next((cause for cause in CAUSES if cause.matches(circumstance)), None)


# -- what the rows ask -----------------------------------------------------------------------------

_DECOMPOSITIONS = (
    "LinalgEighBackward",
    "LinalgSvdBackward",
    "LinalgEigBackward",
    "LinalgQrBackward",
)
_DOMAINS = {
    "log": "x > 0", "log2": "x > 0", "log10": "x > 0", "log1p": "x > -1", "sqrt": "x ≥ 0",
    "rsqrt": "x > 0", "acos": "-1 ≤ x ≤ 1", "asin": "-1 ≤ x ≤ 1", "atanh": "-1 < x < 1",
    "acosh": "x ≥ 1", "erfinv": "-1 < x < 1", "pow": "x ≥ 0 for a fractional exponent",
    "lgamma": "x not 0, -1, -2, …", "digamma": "x not 0, -1, -2, …", "logit": "0 < x < 1",
}  # fmt: skip
_POLES = ("log1p", "atanh", "erfinv", "lgamma", "digamma", "logit", "log", "log2", "log10")
_EXPONENTIALS = ("exp", "expm1", "exp2", "cosh", "sinh", "softplus")
_DIVISIONS = ("div", "reciprocal", "true_divide", "divide", "remainder", "rsqrt")
_STEEP = {
    "sqrt": "0", "pow": "0", "rsqrt": "0", "acos": "±1", "asin": "±1", "acosh": "1",
    "atanh": "±1", "log": "0", "log2": "0", "log10": "0", "norm": "0", "linalg_vector_norm": "0",
    "cdist_forward": "0", "std": "zero spread", "prod": "0",
}  # fmt: skip
_SOFTMAXES = ("softmax", "log_softmax", "logsumexp", "safe_softmax")
_MASKING = (
    "Where", "MaskedFill", "MaskedSelect", "MaskedScatter", "Index", "Clamp", "NanToNum",
    "Minimum", "Maximum", "Relu", "Threshold",
)  # fmt: skip
_LARGEST = {"float16": 65504.0, "bfloat16": 3.39e38}
_HALF = ("float16", "bfloat16")


def _is_decomposition(c: Circumstance) -> bool:
    return c.phase == "backward" and (c.node or "").startswith(_DECOMPOSITIONS)


def _some(count: int | None) -> bool:
    return bool(count)


def _divisor(c: Circumstance) -> Operand | None:
    if c.formula in ("reciprocal", "rsqrt"):
        return c.operand("self")
    return c.operand("other")


def _divides_by_zero(c: Circumstance) -> bool:
    divisor = _divisor(c)
    return c.formula in _DIVISIONS and divisor is not None and _some(divisor.at_zero)


def _incoming_is_zero(c: Circumstance) -> bool:
    """Whether the incoming gradient is exactly 0 at every offending element."""
    if c.birth is None or c.birth.kind != "nan":
        return False
    incoming = c.operand("self", "grad", "grad_output")
    return incoming is None or incoming.at_zero is None or incoming.at_zero == c.birth.count


def _is_masked_afterwards(c: Circumstance) -> bool:
    return any(node.startswith(_MASKING) for node in c.after)


def _is_steep(c: Circumstance) -> bool:
    return c.phase == "backward" and c.base in _STEEP


def _operands(c: Circumstance) -> Sequence[Operand]:
    return c.birth.operands if c.birth else ()


def _overflows(c: Circumstance, *dtypes: str) -> bool:
    """Whether an inf came out of finite operands none of which is 0 where it stands."""
    if c.birth is None or "inf" not in c.birth.kind or c.birth.from_asked:
        return False
    return c.dtype in dtypes and not _divides_by_zero(c) and not _at_pole(c)


def _at_pole(c: Circumstance) -> bool:
    argument = c.operand("self")
    if argument is None or c.formula not in _POLES or c.birth is None or "inf" not in c.birth.kind:
        return False
    return c.formula not in _EXPONENTIALS


def _quote(operand: Operand | None) -> str:
    if operand is None or not operand.at:
        return ""
    values = dict.fromkeys(f"{value:.4g}" for value in operand.at)
    return f" ({', '.join(values)})"


def _elements(c: Circumstance) -> str:
    count = c.birth.count if c.birth else 0
    return f"{count} element{'' if count == 1 else 's'}"


# -- the reasons -----------------------------------------------------------------------------------


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
        f"{c.base} is real only for {_DOMAINS[c.base]}; {_elements(c)} of its argument "
        f"lie outside{_quote(argument)}."
    )


def _why_pole(c: Circumstance) -> str:
    return f"{c.base} is infinite at its argument{_quote(c.operand('self'))} in {_elements(c)}."


def _why_zero(c: Circumstance) -> str:
    divisor = _divisor(c)
    zeros = divisor.at_zero if divisor else 0
    kind = "0/0" if c.birth and c.birth.kind == "nan" else "a finite number by 0"
    where = "the formula of its backward divides" if c.phase == "backward" else "it divides"
    return f"In {_elements(c)} {where} {kind}: the divisor is exactly 0 in {zeros} of them."


def _why_steep(c: Circumstance) -> str:
    return (
        f"The derivative of {c.base} is infinite at {_STEEP[c.base]}, and {_elements(c)} of its "
        f"argument stand exactly there."
    )


def _why_masked(c: Circumstance) -> str:
    return (
        f"The branch is masked out afterwards, so the gradient that arrives at {_elements(c)} is "
        f"exactly 0; the derivative of {c.base} is not finite there, and 0 times that is NaN."
    )


def _why_low(c: Circumstance) -> str:
    limit = _LARGEST[c.dtype]
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


# -- the table -------------------------------------------------------------------------------------

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
        _is_decomposition,
        _why_degenerate,
        ("gap_only_projector", "values_only", "detach_vectors"),
    ),
    Cause(
        "fully_masked_reduction",
        "Every entry of a row is -inf",
        "A softmax normalises by the sum of exponentials; over a row in which every entry is "
        "-inf that sum is 0, and the result is NaN. The mask is intended, the row without any "
        "entry is not.",
        lambda c: c.base in _SOFTMAXES and c.birth is not None and c.birth.from_asked,
        _why_row,
        ("finfo_min_mask", "zero_empty_rows"),
    ),
    Cause(
        "optimizer_arithmetic",
        "The update rule divides by zero",
        "The update divides by the root of a running mean of squares plus eps. A parameter "
        "that never had a gradient has 0 there, and with eps = 0 the update is 0/0.",
        lambda c: c.phase == "optimizer" and c.dtype not in _HALF,
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
        lambda c: c.phase == "backward" and _incoming_is_zero(c) and _is_masked_afterwards(c),
        _why_masked,
        ("double_where",),
    ),
    Cause(
        "infinite_derivative_at_boundary",
        "The derivative is infinite at the boundary",
        "The function is fine at the point, its slope is not: the square root at 0, the arc "
        "cosine at 1, a fractional power at 0. The gradient is infinite there, and becomes "
        "NaN at the next product with 0.",
        lambda c: _is_steep(c) and c.birth is not None and "inf" in c.birth.kind,
        _why_steep,
        ("safe_argument", "clamp"),
    ),
    Cause(
        "zero_denominator_in_backward",
        "The backward formula divides by zero",
        "The forward is finite, or hides it; the formula of the backward divides by a number "
        "that is exactly 0.",
        lambda c: c.phase == "backward" and (_divides_by_zero(c) or _is_steep(c)),
        lambda c: _why_zero(c) if _divides_by_zero(c) else _why_steep(c),
        ("safe_denominator", "double_where"),
    ),
    Cause(
        "zero_denominator_forward",
        "Division by an exact zero",
        "A division, a reciprocal or a normalisation by exactly 0 in the forward.",
        lambda c: c.phase == "forward" and _divides_by_zero(c),
        _why_zero,
        ("safe_denominator",),
    ),
    Cause(
        "overflow_low_precision",
        "The result does not fit the half precision",
        "float16 ends at 65504 and bfloat16 has few digits; a result that float32 holds "
        "easily becomes infinite. In the forward the operation needs a wider dtype, in the "
        "backward a smaller loss scale may do.",
        lambda c: _overflows(c, *_HALF),
        _why_low,
        ("upcast", "smaller_loss_scale"),
    ),
    Cause(
        "overflow_exp",
        "An exponential overflows",
        "exp of a number above 88.7 does not fit float32 (709.8: float64). Most formulas with "
        "exp have a form that never needs the large number: logsumexp, softplus, log_softmax.",
        lambda c: c.formula in _EXPONENTIALS and _overflows(c, "float32", "float64"),
        _why_exp,
        ("stable_formulation", "clamp"),
    ),
    Cause(
        "pole",
        "The argument is a pole of the function",
        "The function is infinite at this very argument: log at 0, atanh at 1, lgamma at 0.",
        lambda c: c.phase == "forward" and _at_pole(c),
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
            and c.base in _DOMAINS
            and c.birth is not None
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
        lambda c: c.birth is None or c.birth.from_asked,
        _fixed("An infinity that was let stand meets 0 or another infinity here, which is NaN."),
        ("finite_constant",),
    ),
    Cause(
        "overflow_fp32",
        "The result does not fit the precision",
        "Repeated products, sums of squares or a recurrence grow until the dtype ends.",
        lambda c: _overflows(c, "float32", "float64", "complex64", "complex128"),
        lambda c: f"Finite operands, and a result beyond the range of {c.dtype} in {_elements(c)}.",
        ("rescale", "fp64"),
    ),
)
