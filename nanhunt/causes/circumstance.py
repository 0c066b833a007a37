"""What is known about a culprit, and the questions that the rows of the table ask of it."""

from dataclasses import dataclass, field
from math import inf, isnan

from nanhunt.records import Birth, Inquiry, Operand, Phase, Spectrum, TensorFacts


@dataclass(frozen=True, slots=True)
class Circumstance:
    """What is known about a culprit when its cause is looked up.

    `op` is the forward op (for a backward fault: the origin), `formula_op` the op that returned
    the non-finite value. `after` names the autograd nodes that ran before the guilty one and whose
    forward ops came after it: what was done with its result. `samples` is the size of the batch,
    `output` what was counted in the guilty output, `turned_by` the op that made NaN of its
    infinity, `is_hook` whether a user's hook was running, `is_asked` whether an infinity that the
    program asked for is all there was, `is_unwritten` whether a tensor looks like memory that was
    never written to, `is_kept_nan` whether what a backward met was NaN and no infinity. `inquiry`
    is empty where none was made.
    """

    phase: Phase
    op: str
    node: str | None
    formula_op: str
    dtype: str
    birth: Birth | None
    after: tuple[str, ...] = ()
    samples: int | None = None
    output: TensorFacts | None = None
    turned_by: str | None = None
    is_hook: bool = False
    is_asked: bool = False
    is_unwritten: bool = False
    is_kept_nan: bool = False
    inquiry: Inquiry = field(default_factory=Inquiry)

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


def is_collective(op: str) -> bool:
    """Whether an op exchanges tensors with other ranks."""
    return op.startswith(("c10d::", "_c10d_functional::"))


def matrices_or_samples(spectrum: Spectrum, samples: int | None) -> str:
    """What to call the matrices of a decomposition: one per sample of the batch is a sample."""
    return "samples" if spectrum.matrices == samples else "matrices"


# Ops that pick some elements of a tensor out of many.
PICKS = (
    "gather",
    "index",
    "index_select",
    "nll_loss_forward",
    "nll_loss2d_forward",
    "select",
    "take",
    "masked_select",
)
AVERAGES = ("mean", "nanmean", "std", "var", "std_mean", "var_mean")
NORMALISATIONS = (
    "native_batch_norm", "native_layer_norm", "native_group_norm", "cudnn_batch_norm",
    "native_batch_norm_legit", "native_batch_norm_legit_no_training", "fused_rms_norm",
    "weight_norm_interface",
)  # fmt: skip
SOLVERS = (
    "linalg_solve_ex", "linalg_solve_triangular", "triangular_solve", "linalg_inv_ex",
    "linalg_slogdet", "linalg_det", "linalg_lu_solve", "lu_solve", "cholesky_solve",
    "cholesky_inverse", "linalg_lstsq", "linalg_cholesky_ex", "linalg_ldl_solve", "logdet",
)  # fmt: skip
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
_LOGS = ("log", "log2", "log10", "xlogy")
POLES = (*_LOGS, "log1p", "atanh", "erfinv", "lgamma", "digamma", "logit", "xlog1py")
EXPONENTIALS = (
    "exp", "expm1", "exp2", "cosh", "sinh", "softplus", "linalg_matrix_exp", "i0", "special_i0",
    "special_i1", "special_erfcx",
)  # fmt: skip
DIVISIONS = (
    "div",
    "reciprocal",
    "remainder",
    "rsqrt",
    "addcdiv",
    "foreach_addcdiv",
    "foreach_div",
)
STEEP = {
    "sqrt": "0", "pow": "0", "rsqrt": "0", "acos": "±1", "asin": "±1", "acosh": "1",
    "atanh": "±1", "log": "0", "log2": "0", "log10": "0", "norm": "0", "linalg_vector_norm": "0",
    "cdist_forward": "0", "std": "zero spread", "prod": "0", "special_entr": "0", "xlogy": "0",
    "log1p": "-1", "erfinv": "±1", "logit": "0 and 1",
}  # fmt: skip
SOFTMAXES = ("softmax", "log_softmax", "logsumexp", "safe_softmax")
_MASKING = (
    "Where", "MaskedFill", "MaskedSelect", "MaskedScatter", "Index", "Clamp", "Minimum", "Maximum",
    "Relu", "Threshold",
)  # fmt: skip
LARGEST = {"float16": 65504.0, "bfloat16": 3.39e38}
HALF = ("float16", "bfloat16")


def is_decomposition(c: Circumstance) -> bool:
    """Whether the backward of a matrix decomposition is at fault."""
    return c.phase == "backward" and (c.node or "").startswith(_DECOMPOSITIONS)


def divisor_of(c: Circumstance) -> Operand | None:
    """The operand by which the op divides, where it has one."""
    if c.formula in ("reciprocal", "rsqrt") or is_negative_power(c):
        return c.operand("self")
    return c.operand("other", "tensor2")


def is_negative_power(c: Circumstance) -> bool:
    """Whether the op divides by a power of its base: `degree.pow(-0.5)`.

    Where a backward does so the slope of the forward op is what is infinite.
    """
    if c.formula != "pow" or c.phase == "backward" or c.birth is None:
        return False
    exponent = c.operand("exponent")
    exponents = exponent.at if exponent else (dict(c.birth.scalars).get("exponent", 0.0),)
    return bool(exponents) and max(exponents) < 0


def divides_by_zero(c: Circumstance) -> bool:
    """Whether the op divides by exactly 0 at an offending element."""
    is_division = c.formula in DIVISIONS or is_negative_power(c)
    if not is_division or c.birth is None:
        return False
    divisor = divisor_of(c)
    if divisor is None:  # a plain number, as in `/ len(batch)`
        return dict(c.birth.scalars).get("other") == 0
    return bool(divisor.at_zero)


def is_incoming_zero(c: Circumstance) -> bool:
    """Whether the incoming gradient is exactly 0 at every offending element."""
    if c.birth is None or c.birth.kind != "nan":
        return False
    incoming = c.operand("self", "grad", "grad_output")
    return incoming is None or incoming.at_zero is None or incoming.at_zero == c.birth.count


def is_masked(c: Circumstance) -> bool:
    """Whether the program took the result out of the forward: by where, a mask or a bound.

    Without an inquiry the names of the nodes must do: something made of the result is masked, and
    the gradient that comes back is exactly 0.
    """
    if c.inquiry.result is None and c.inquiry.removed_by is None:
        masks = any(node.startswith(_MASKING) for node in c.after)
        # The loss is finite: a NaN that the forward left was taken out of it.
        return (c.birth is None and c.is_kept_nan) or (masks and is_incoming_zero(c))
    removed = base_name(c.inquiry.removed_by or "")
    # nan_to_num over 0 times an infinity that was asked for hides a product, not a branch.
    return bool(removed) and (removed != "nan_to_num" or not is_kept_infinity(c))


def is_empty_row(c: Circumstance) -> bool:
    """Whether a softmax met a row without any entry, or its backward what had come of that."""
    if c.base not in SOFTMAXES or c.birth is None:
        return False
    result = c.inquiry.result
    return c.birth.from_asked or (result is not None and isnan(result))


def is_empty_maximum(c: Circumstance) -> bool:
    """Whether a row less its own maximum met a row of nothing but -inf: a softmax by hand."""
    if c.base not in ("sub", "rsub") or c.birth is None or not c.birth.from_asked:
        return False
    made = (a for _, chain in c.inquiry.lineage for a in chain)
    return any(base_name(a.op) in ("amax", "max") and a.value == -inf for a in made)


def is_empty_reduction(c: Circumstance) -> bool:
    """Whether a mean or a spread was asked of too few elements."""
    if c.birth is None or "nan" not in c.birth.kind or c.output is None:
        return False
    if c.base.startswith("nll_loss"):
        values = c.operand("self")
        return values is not None and values.facts.is_finite
    if c.base == "div":
        return dict(c.birth.scalars).get("other") == 0 and _is_sum(c)
    if c.base == "segment_reduce":  # of the ways in which it reduces, the mean alone divides
        data = c.operand("data")
        return data is not None and data.facts.is_finite
    of = c.operand("self", "input")
    if c.base not in AVERAGES or of is None or not of.facts.is_finite:
        return False
    count = of.facts.numel / max(c.output.numel, 1)
    least = (
        dict(c.birth.scalars).get("correction", 1.0) if c.base not in ("mean", "nanmean") else 0.0
    )
    return count <= least


def _is_sum(c: Circumstance) -> bool:
    """Whether the dividend is a sum, as far as is known."""
    chain = c.inquiry.chain("self")
    return not chain or base_name(chain[0].op) in ("sum", "nansum", "count_nonzero")


def is_unguarded(c: Circumstance) -> bool:
    """Whether a normalisation divides by a spread that no eps guards."""
    scalars = dict(c.birth.scalars) if c.birth else {}
    return c.base in NORMALISATIONS and scalars.get("eps", 0.0) == 0


def is_steep(c: Circumstance) -> bool:
    """Whether the forward op has points at which its derivative is infinite."""
    return c.phase == "backward" and c.base in STEEP and not is_beyond_domain(c)


def is_beyond_domain(c: Circumstance) -> bool:
    """Whether the argument is outside the domain of a function.

    In the backward it is a function of the formula: the derivative by an exponent takes the
    logarithm of the base.
    """
    if c.birth is None or "nan" not in c.birth.kind or c.birth.from_asked:
        return False
    if c.phase == "forward":
        return c.base in DOMAINS or is_negative_variance(c)
    argument = c.operand("self")
    is_negative = argument is not None and bool(argument.at) and min(argument.at) < 0
    return c.phase == "backward" and c.formula in _LOGS and is_negative


def is_negative_variance(c: Circumstance) -> bool:
    """Whether a normalisation takes the root of a kept variance that is negative."""
    variance = c.operand("running_var")
    eps = dict(c.birth.scalars).get("eps", 0.0) if c.birth else 0.0
    smallest = variance.smallest if variance else None
    return c.base in NORMALISATIONS and smallest is not None and smallest + eps < 0


def overflows(c: Circumstance, *dtypes: str) -> bool:
    """Whether an inf came out of finite operands none of which is 0 where it stands.

    A fused kernel hides it, and may return NaN; what is inside of it was replayed.
    """
    if c.inquiry.is_inner_overflow:
        return c.dtype in dtypes
    if c.birth is None or "inf" not in c.birth.kind or c.birth.from_asked:
        return False
    return c.dtype in dtypes and not divides_by_zero(c) and not is_at_pole(c)


def is_at_pole(c: Circumstance) -> bool:
    """Whether a function with poles returned an infinity."""
    return c.birth is not None and c.formula in POLES and "inf" in c.birth.kind


def is_infinity_turned(c: Circumstance) -> bool:
    """Whether the log of an exact 0 was tolerated until it met 0: 0 · log 0."""
    return c.phase == "forward" and c.base in _LOGS and c.turned_by == "mul" and is_at_pole(c)


def is_kept_infinity(c: Circumstance) -> bool:
    """Whether a backward met an infinity that the forward had let stand."""
    if c.birth is None:
        return c.phase == "backward" and not c.is_kept_nan
    return c.birth.from_asked


def is_let_through(c: Circumstance) -> bool:
    """Whether an infinity that the program wrote down is all that reached the loss."""
    return c.is_asked and c.phase == "forward"


def has_grown(c: Circumstance) -> bool:
    """Whether the parameters grew beyond what training does since the first step."""
    return c.inquiry.growth is not None and c.inquiry.growth > _RUNAWAY


# Weights that grow so much within a run are not learning.
_RUNAWAY = 100.0


def is_unwritten(c: Circumstance) -> bool:
    """Whether a tensor that the step was given looks like memory that nobody wrote to."""
    return c.phase == "data" and c.op == "parameter" and c.is_unwritten


def is_singular(c: Circumstance) -> bool:
    """Whether a solver made the value, or its backward read an infinity that it had returned."""
    if c.base not in SOLVERS or c.phase == "optimizer":
        return False
    return c.birth is not None or (c.phase == "backward" and not c.is_kept_nan)


def is_scale_zero(c: Circumstance) -> bool:
    """Whether a scaler took the reciprocal of its scale, one FP64 number, and that was 0."""
    is_number = c.output is not None and c.output.shape == () and c.dtype == "float64"
    return c.phase == "optimizer" and c.base == "reciprocal" and is_number and divides_by_zero(c)
