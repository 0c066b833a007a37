"""What is known about a culprit, and the questions that the rows of the table ask of it."""

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


def base_name(op: str) -> str:
    """`aten::_linalg_eigh` and `aten::div_` as `linalg_eigh` and `div`."""
    return op.rsplit("::", maxsplit=1)[-1].strip("_")


def matrices_or_samples(spectrum: Spectrum, samples: int | None) -> str:
    """What to call the matrices of a decomposition: one per sample of the batch is a sample."""
    return "samples" if spectrum.matrices == samples else "matrices"


_DECOMPOSITIONS = (
    "LinalgEighBackward",
    "LinalgSvdBackward",
    "LinalgEigBackward",
    "LinalgQrBackward",
)
DOMAINS = {
    "log": "x > 0", "log2": "x > 0", "log10": "x > 0", "log1p": "x > -1", "sqrt": "x ≥ 0",
    "rsqrt": "x > 0", "acos": "-1 ≤ x ≤ 1", "asin": "-1 ≤ x ≤ 1", "atanh": "-1 < x < 1",
    "acosh": "x ≥ 1", "erfinv": "-1 < x < 1", "pow": "x ≥ 0 for a fractional exponent",
    "lgamma": "x not 0, -1, -2, …", "digamma": "x not 0, -1, -2, …", "logit": "0 < x < 1",
}  # fmt: skip
_POLES = ("log1p", "atanh", "erfinv", "lgamma", "digamma", "logit", "log", "log2", "log10")
EXPONENTIALS = ("exp", "expm1", "exp2", "cosh", "sinh", "softplus")
_DIVISIONS = ("div", "reciprocal", "true_divide", "divide", "remainder", "rsqrt")
STEEP = {
    "sqrt": "0", "pow": "0", "rsqrt": "0", "acos": "±1", "asin": "±1", "acosh": "1",
    "atanh": "±1", "log": "0", "log2": "0", "log10": "0", "norm": "0", "linalg_vector_norm": "0",
    "cdist_forward": "0", "std": "zero spread", "prod": "0",
}  # fmt: skip
SOFTMAXES = ("softmax", "log_softmax", "logsumexp", "safe_softmax")
_MASKING = (
    "Where", "MaskedFill", "MaskedSelect", "MaskedScatter", "Index", "Clamp", "NanToNum",
    "Minimum", "Maximum", "Relu", "Threshold",
)  # fmt: skip
LARGEST = {"float16": 65504.0, "bfloat16": 3.39e38}
HALF = ("float16", "bfloat16")


def is_decomposition(c: Circumstance) -> bool:
    """Whether the backward of a matrix decomposition is at fault."""
    return c.phase == "backward" and (c.node or "").startswith(_DECOMPOSITIONS)


def divisor_of(c: Circumstance) -> Operand | None:
    """The operand by which the op divides, where it has one."""
    if c.formula in ("reciprocal", "rsqrt"):
        return c.operand("self")
    return c.operand("other")


def divides_by_zero(c: Circumstance) -> bool:
    """Whether the op divides by exactly 0 at an offending element."""
    divisor = divisor_of(c)
    return c.formula in _DIVISIONS and divisor is not None and bool(divisor.at_zero)


def is_incoming_zero(c: Circumstance) -> bool:
    """Whether the incoming gradient is exactly 0 at every offending element."""
    if c.birth is None or c.birth.kind != "nan":
        return False
    incoming = c.operand("self", "grad", "grad_output")
    return incoming is None or incoming.at_zero is None or incoming.at_zero == c.birth.count


def is_masked_afterwards(c: Circumstance) -> bool:
    """Whether the program masks, selects or clamps something made of the result."""
    return any(node.startswith(_MASKING) for node in c.after)


def is_steep(c: Circumstance) -> bool:
    """Whether the forward op has points at which its derivative is infinite."""
    return c.phase == "backward" and c.base in STEEP


def overflows(c: Circumstance, *dtypes: str) -> bool:
    """Whether an inf came out of finite operands none of which is 0 where it stands."""
    if c.birth is None or "inf" not in c.birth.kind or c.birth.from_asked:
        return False
    return c.dtype in dtypes and not divides_by_zero(c) and not is_at_pole(c)


def is_at_pole(c: Circumstance) -> bool:
    """Whether a function with poles returned an infinity."""
    return c.birth is not None and c.formula in _POLES and "inf" in c.birth.kind
