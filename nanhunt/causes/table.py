"""The table of known causes."""

from collections.abc import Callable
from dataclasses import dataclass

from nanhunt.causes.circumstance import (
    EXPONENTIALS,
    HALF,
    PICKS,
    Circumstance,
    divides_by_zero,
    has_grown,
    is_at_pole,
    is_beyond_domain,
    is_collective,
    is_decomposition,
    is_empty_maximum,
    is_empty_reduction,
    is_empty_row,
    is_infinity_turned,
    is_kept_infinity,
    is_let_through,
    is_masked,
    is_scale_zero,
    is_singular,
    is_steep,
    is_unguarded,
    is_unwritten,
    overflows,
)
from nanhunt.causes.lineage import made
from nanhunt.causes.sentences import (
    fixed,
    why_beyond,
    why_cancelled,
    why_degenerate,
    why_domain,
    why_empty,
    why_exp,
    why_given,
    why_growth,
    why_guard,
    why_infinite,
    why_low,
    why_masked,
    why_normalised,
    why_pole,
    why_row,
    why_steep,
    why_underflow,
    why_update,
    why_zero,
)


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


WIDE = ("float32", "float64", "complex64", "complex128")

CAUSES: tuple[Cause, ...] = (
    Cause(
        "uninitialised_memory",
        "A parameter was allocated and never written to",
        "torch.empty and to_empty give memory with whatever was in it. A parameter made so and "
        "never initialised may look fine for a long time, and be NaN on another machine.",
        is_unwritten,
        fixed(
            "The parameter was there before the step, and its values look like memory that was "
            "never written to: nothing in the step made them."
        ),
        ("initialise",),
    ),
    Cause(
        "bad_data",
        "A tensor was non-finite before the step",
        "An input, a buffer, a parameter or a gradient that was left in `.grad` or is handed to "
        "backward() holds NaN or an infinity when the step starts, so "
        "every operation that reads it passes it on. Look at where the tensor was made: the "
        "data, the checkpoint, an earlier step.",
        lambda c: c.phase == "data",
        why_given,
        ("validate_batch",),
    ),
    Cause(
        "received_from_another_rank",
        "A collective brought a non-finite value",
        "An all-reduce adds what every rank gives. What is non-finite on one rank is so on all of "
        "them afterwards, and in half precision finite numbers may add up to more than the dtype "
        "holds. The rank whose own report names an op of its model is where it began.",
        lambda c: is_collective(c.op),
        fixed(
            "All that this rank gave was finite: another rank sent the value, or the sum left the "
            "range of the dtype. Look at the report of the other ranks."
        ),
        ("look_at_other_ranks", "reduce_in_fp32"),
    ),
    Cause(
        "custom_function_bug",
        "A custom autograd.Function returns a non-finite gradient",
        "The backward of a user's autograd.Function is Python like any other: a formula that "
        "overflows or divides by zero there is not covered by torch's own care. The report "
        "names the line inside it.",
        lambda c: c.phase == "backward" and c.op.startswith("custom:"),
        fixed(
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
        fixed("Each gradient is finite; the sum that the engine makes at the fan-out is not."),
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
        why_degenerate,
        ("gap_only_projector", "values_only", "detach_vectors"),
    ),
    Cause(
        "singular_matrix",
        "A singular matrix is solved, inverted or has its determinant taken",
        "A matrix without full rank has no inverse and a determinant of 0, whose logarithm is "
        "-inf. Rows that depend on each other, a zero on the diagonal of a triangular system and "
        "a Gram matrix of repeated vectors are the common ways there.",
        is_singular,
        fixed("The matrix is singular: the system has no solution, or its determinant is 0."),
        ("diagonal_loading", "least_squares"),
    ),
    Cause(
        "infeasible_target",
        "The target has probability 0 by construction",
        "A CTC target longer than its input, an action that the mask forbids: the model gives it "
        "probability 0 whatever its parameters, and the negative logarithm of that is inf. The "
        "target, or the mask, is wrong.",
        lambda c: (
            c.base in ("ctc_loss", "cudnn_ctc_loss")
            or (c.is_asked and c.base in (*PICKS, "log_softmax"))
        ),
        fixed(
            "The target cannot be reached whatever the parameters are: its probability is 0, and "
            "the loss takes the logarithm."
        ),
        ("check_targets", "zero_infinity"),
    ),
    Cause(
        "empty_reduction",
        "A mean or a spread over too few elements",
        "The mean of nothing is 0/0, and so is the unbiased standard deviation of one number. A "
        "filter that lets nothing through, a last batch of one sample and a loss whose targets are "
        "all ignored end there.",
        is_empty_reduction,
        why_empty,
        ("skip_empty", "drop_last", "correction_zero"),
    ),
    Cause(
        "fully_masked_reduction",
        "Every entry of a row is -inf",
        "A softmax normalises by the sum of exponentials; over a row in which every entry is "
        "-inf that sum is 0, and the result is NaN. The mask is intended, the row without any "
        "entry is not.",
        lambda c: is_empty_row(c) or is_empty_maximum(c),
        why_row,
        ("finfo_min_mask", "zero_empty_rows"),
    ),
    Cause(
        "zero_loss_scale",
        "The loss scale is 0",
        "A GradScaler divides the gradients by its scale before the step. At a scale of 0 all "
        "gradients are 0 and their quotients NaN. A scale falls there when it is halved without "
        "end, because some gradient is non-finite at every scale, or when it is set so.",
        is_scale_zero,
        fixed("The scaler's scale is 0, and the gradients are divided by it before the step."),
        ("initial_scale", "find_the_overflow"),
    ),
    Cause(
        "divergence",
        "The parameters ran away",
        "With too large a learning rate every step overshoots more than the one before, until some "
        "op leaves the range of its dtype. That op is not at fault; the growth of the steps before "
        "it is.",
        lambda c: has_grown(c) and overflows(c, *HALF, *WIDE) and c.phase != "optimizer",
        why_growth,
        ("smaller_learning_rate", "warm_up", "clip_gradients"),
    ),
    Cause(
        "eps_underflow_low_precision",
        "The guard does not survive the precision",
        "An eps of 1e-8 is 0 in float16, and 1 - 1e-7 is 1 in bfloat16: the guard against the "
        "singular point is written down, and the dtype rounds it onto that very point.",
        lambda c: (
            made(c, "guard") is not None
            or (c.phase == "optimizer" and c.dtype in HALF and divides_by_zero(c))
        ),
        why_guard,
        ("eps_for_dtype", "upcast"),
    ),
    Cause(
        "optimizer_arithmetic",
        "The update rule divides by zero",
        "The update divides by the root of a running mean of squares plus eps. A parameter "
        "that never had a gradient has 0 there, and with eps = 0 the update is 0/0.",
        lambda c: c.phase == "optimizer" and not overflows(c, *HALF, *WIDE),
        why_update,
        ("optimizer_eps", "safe_denominator"),
    ),
    Cause(
        "masked_branch_backward",
        "The masked branch still has a backward",
        "torch.where, a mask or a clamp hides a branch in the forward only. Its backward "
        "still runs, with an incoming gradient of exactly 0, and 0 times an infinite "
        "derivative is NaN. The argument must be made safe before the function, not the "
        "result after it.",
        lambda c: c.phase == "backward" and not c.is_hook and is_masked(c),
        why_masked,
        ("double_where",),
    ),
    Cause(
        "underflow_to_zero",
        "A positive number became exactly 0",
        "A probability, a kernel or a product of many factors is positive on paper and too small "
        "for the dtype: it becomes 0, and the logarithm or the division that follows has no "
        "answer. Forms that stay in the logarithm never need the small number.",
        lambda c: made(c, "underflow") is not None and (divides_by_zero(c) or is_at_pole(c)),
        why_underflow,
        ("stable_formulation", "safe_argument", "upcast"),
    ),
    Cause(
        "cancellation",
        "A difference that rounding made 0 or negative",
        "1 - p for p near 1, E[x²] - E[x]²: the difference is positive in exact arithmetic, and "
        "all the digits that say so were rounded away before the subtraction. What follows meets "
        "a 0 or a negative number.",
        lambda c: made(c, "difference") is not None and bool(c.inquiry.is_gone_in_fp64),
        why_cancelled,
        ("stable_formulation", "upcast", "clamp"),
    ),
    Cause(
        "inf_minus_inf_or_zero_times_inf",
        "An infinity meets 0 or another infinity",
        "An infinity that was let stand, as a mask or as the log of 0, meets a 0 in a product "
        "or another infinity in a difference.",
        lambda c: is_infinity_turned(c) or is_kept_infinity(c) or is_let_through(c),
        why_infinite,
        ("finite_constant",),
    ),
    Cause(
        "infinite_derivative_at_boundary",
        "The derivative is infinite at the boundary",
        "The function is fine at the point, its slope is not: the square root at 0, the arc "
        "cosine at 1, a fractional power at 0. The gradient is infinite there, and becomes "
        "NaN at the next product with 0.",
        lambda c: is_steep(c) and c.birth is not None and not c.is_hook,
        why_steep,
        ("safe_argument", "clamp"),
    ),
    Cause(
        "zero_denominator_in_backward",
        "The backward formula divides by zero",
        "The forward is finite, or hides it; the formula of the backward divides by a number "
        "that is exactly 0.",
        lambda c: c.phase == "backward" and divides_by_zero(c),
        why_zero,
        ("safe_denominator", "double_where"),
    ),
    Cause(
        "zero_denominator_forward",
        "Division by an exact zero",
        "A division, a reciprocal or a normalisation by exactly 0 in the forward.",
        lambda c: c.phase == "forward" and (divides_by_zero(c) or is_unguarded(c)),
        lambda c: why_zero(c) if divides_by_zero(c) else why_normalised(c),
        ("safe_denominator",),
    ),
    Cause(
        "overflow_low_precision",
        "The result does not fit the half precision",
        "float16 ends at 65504 and bfloat16 has few digits; a result that float32 holds "
        "easily becomes infinite. In the forward the operation needs a wider dtype, in the "
        "backward a smaller loss scale may do.",
        lambda c: overflows(c, *HALF),
        why_low,
        ("upcast", "smaller_loss_scale"),
    ),
    Cause(
        "overflow_exp",
        "An exponential overflows",
        "exp of a number above 88.7 does not fit float32 (709.8: float64). Most formulas with "
        "exp have a form that never needs the large number: logsumexp, softplus, log_softmax.",
        lambda c: c.formula in EXPONENTIALS and overflows(c, "float32", "float64"),
        why_exp,
        ("stable_formulation", "clamp"),
    ),
    Cause(
        "pole",
        "The argument is a pole of the function",
        "The function is infinite at this very argument: log at 0, atanh at 1, lgamma at 0.",
        lambda c: c.phase == "forward" and is_at_pole(c),
        why_pole,
        ("safe_argument",),
    ),
    Cause(
        "domain_error",
        "The argument is outside the domain",
        "The function has no real value for this argument: the log of a negative number, the "
        "arc cosine of 1.0000001. Rounding is often what pushed it over.",
        is_beyond_domain,
        why_domain,
        ("clamp", "safe_argument"),
    ),
    Cause(
        "overflow_fp32",
        "The result does not fit the precision",
        "Repeated products, sums of squares or a recurrence grow until the dtype ends.",
        lambda c: overflows(c, *WIDE),
        why_beyond,
        ("rescale", "fp64"),
    ),
)
