"""Each cause of the table on its own circumstance, and what it must not match."""

from dataclasses import replace
from pathlib import Path

import pytest

from nanhunt.causes import (
    CAUSES,
    Circumstance,
    base_name,
    causes_of,
    is_difference,
    known_cause,
    matrices_or_samples,
)
from nanhunt.causes.by_op import _KNOWN_FOR
from nanhunt.causes.lineage import lost_guard, making
from nanhunt.records import Ancestor, Birth, Inquiry, Operand, Spectrum, TensorFacts

DOCS = Path(__file__).parents[2] / "docs" / "causes.md"
FACTS = TensorFacts((4,), "float32")
ONE = TensorFacts((), "float32", nan=1)
TIED = Spectrum(64, 144, 63, 7, 0.0, 1e-4, 5, 1.2)


def operand(role, *at, zero=0):
    """An operand that met these values at the offending elements."""
    return Operand(role, FACTS, at=at, at_zero=zero)


def birth(kind, *operands, count=2, **more):
    """Some elements that were born."""
    return Birth(0, count, kind, operands=operands, **more)


def case(phase, op, formula=None, born=None, **more):
    """What is known about a culprit."""
    given = {"node": None, "dtype": "float32"} | more
    return Circumstance(phase, op, formula_op=formula or op, birth=born, **given)


def step(op, value, *operands, dtype="float32", **scalars):
    """One op of a chain: what it returned, and what it was given as `self` and `other`."""
    named = tuple(zip(("self", "other"), operands, strict=False))
    return Ancestor(f"aten::{op}" if op else "", value, dtype, named, tuple(scalars.items()))


def asked(*chain, role="self", **more):
    """What an inquiry told about one operand."""
    return Inquiry(lineage=((role, chain),) if chain else (), **more)


LOST = step("add", 0.0, 0.0, dtype="float16", other=1e-8)
UNDERFLOWN = step("exp", 0.0, -200.0)
CANCELLED = step("sub", 0.0, 1.0, 1.0)
AT_ZERO = birth("inf", operand("self", 0.0, zero=2))
DIVIDES = birth("inf", operand("other", 0.0, zero=2))


# What was measured, the cause that it shows, and its sentence.
CASES = [
    (
        case("data", "parameter", is_unwritten=True),
        "uninitialised_memory",
        (
            "The parameter was there before the step, and its values look like memory that was "
            "never written to: nothing in the step made them."
        ),
    ),
    (
        case("data", "input"),
        "bad_data",
        "The value was there before the step began; no operation of the step made it.",
    ),
    (
        case("backward", "c10d::allreduce_"),
        "received_from_another_rank",
        (
            "All that this rank gave was finite: another rank sent the value, or the sum left the "
            "range of the dtype. Look at the report of the other ranks."
        ),
    ),
    (
        case("backward", "custom:Loss", "aten::div", birth("inf"), node="LossBackward"),
        "custom_function_bug",
        (
            "The backward that the user wrote for this autograd.Function returns a non-finite "
            "gradient for finite inputs."
        ),
    ),
    (
        case("backward", "aten::add", born=birth("inf", by_engine=True), dtype="float16"),
        "gradient_accumulation_overflow",
        "Each gradient is finite; the sum that the engine makes at the fan-out is not.",
    ),
    (
        case(
            "backward",
            "aten::_linalg_eigh",
            "aten::div_",
            birth("nan", operand("other", 0.0, zero=2), spectrum=TIED),
            node="LinalgEighBackward0",
            samples=64,
        ),
        "degenerate_decomposition",
        (
            "The loss uses eigenvectors, and their backward divides by the differences of the "
            "eigenvalues; in 63 of 64 samples two or more that the call returned are "
            "bit-identical, so it computes 0/0."
        ),
    ),
    (
        case(
            "backward",
            "aten::_linalg_svd",
            "aten::div",
            birth("nan", spectrum=TIED),
            node="LinalgSvdBackward0",
            samples=8,
        ),
        "degenerate_decomposition",
        (
            "The loss uses singular vectors, and their backward divides by the differences of the "
            "singular values; in 63 of 64 matrices two or more that the call returned are "
            "bit-identical, so it computes 0/0."
        ),
    ),
    (
        case("backward", "aten::linalg_eig", "aten::div", birth("inf"), node="LinalgEigBackward0"),
        "degenerate_decomposition",
        (
            "The loss uses eigenvectors, and their backward divides by the differences of the "
            "eigenvalues."
        ),
    ),
    (
        case("backward", "aten::linalg_qr", "aten::div", birth("nan"), node="LinalgQrBackward0"),
        "degenerate_decomposition",
        (
            "The backward of QR solves with R, and R is singular: a column is zero or depends on "
            "the others."
        ),
    ),
    (
        case("forward", "aten::linalg_inv_ex", born=birth("inf")),
        "singular_matrix",
        "The matrix is singular: the system has no solution, or its determinant is 0.",
    ),
    (
        case("backward", "aten::_linalg_slogdet", "aten::div", birth("nan")),
        "singular_matrix",
        "The matrix is singular: the system has no solution, or its determinant is 0.",
    ),
    (
        case("forward", "aten::_ctc_loss", born=birth("inf", count=1)),
        "infeasible_target",
        (
            "The target cannot be reached whatever the parameters are: its probability is 0, and "
            "the loss takes the logarithm."
        ),
    ),
    (
        case("forward", "aten::gather", is_asked=True),
        "infeasible_target",
        (
            "The target cannot be reached whatever the parameters are: its probability is 0, and "
            "the loss takes the logarithm."
        ),
    ),
    (
        case(
            "forward",
            "aten::mean",
            born=birth("nan", Operand("self", TensorFacts((0, 3), "float32")), count=3),
            output=TensorFacts((3,), "float32", nan=3),
        ),
        "empty_reduction",
        "mean over [0, 3] has too few elements in 3 elements of its result: 0/0.",
    ),
    (
        case(
            "forward",
            "aten::std",
            born=birth(
                "nan",
                Operand("self", TensorFacts((1,), "float32")),
                count=1,
                scalars=(("correction", 1.0),),
            ),
            output=ONE,
        ),
        "empty_reduction",
        "std over [1] has too few elements in 1 element of its result: 0/0.",
    ),
    (
        case(
            "forward",
            "aten::nll_loss_forward",
            born=birth("nan", operand("self", -1.0), count=1),
            output=ONE,
        ),
        "empty_reduction",
        "Every target is ignored, so the mean is over no element at all: 0/0.",
    ),
    (
        case(
            "forward",
            "aten::div",
            born=birth("nan", operand("self", 0.0, zero=1), count=1, scalars=(("other", 0.0),)),
            output=ONE,
            inquiry=asked(step("sum", 0.0)),
        ),
        "empty_reduction",
        "A sum is divided by a count that is 0.",
    ),
    (
        case("forward", "aten::_softmax", born=birth("nan", count=6, from_asked=True)),
        "fully_masked_reduction",
        (
            "Every entry of a row is -inf, as a mask has it, and softmax of such a row is NaN "
            "(6 elements)."
        ),
    ),
    (
        case(
            "optimizer",
            "aten::reciprocal",
            born=birth("inf", operand("self", 0.0, zero=1), count=1),
            dtype="float64",
            output=TensorFacts((), "float64", posinf=1),
        ),
        "zero_loss_scale",
        "The scaler's scale is 0, and the gradients are divided by it before the step.",
    ),
    (
        case(
            "backward",
            "aten::_softmax",
            "aten::mul",
            birth("nan"),
            inquiry=Inquiry(result=float("nan")),
        ),
        "fully_masked_reduction",
        (
            "Every entry of a row is -inf, as a mask has it, and softmax of such a row is NaN "
            "(2 elements)."
        ),
    ),
    (
        case("forward", "aten::mm", born=birth("inf"), inquiry=Inquiry(growth=2.5e7)),
        "divergence",
        (
            "The parameters grew 2.5e+07 times since the first step, until mm left the range of "
            "float32; it shows late, and the learning rate was too large from the start."
        ),
    ),
    (
        case(
            "forward",
            "aten::_scaled_dot_product_flash_attention_for_cpu",
            born=birth("nan"),
            inquiry=Inquiry(growth=400.0, inner="aten::bmm", is_inner_overflow=True),
        ),
        "divergence",
        (
            "The parameters grew 400 times since the first step, until "
            "scaled_dot_product_flash_attention_for_cpu left the range of float32; it shows late, "
            "and the learning rate was too large from the start."
        ),
    ),
    (
        case("forward", "aten::log", born=AT_ZERO, dtype="float16", inquiry=asked(LOST)),
        "eps_underflow_low_precision",
        (
            "The guard is lost to rounding: add with other = 1e-08 returned 0, since float16 has "
            "no such number there; log then meets exactly that value."
        ),
    ),
    (
        case(
            "backward",
            "aten::acos",
            "aten::rsqrt",
            birth("inf", operand("self", 0.0, zero=2)),
            dtype="bfloat16",
            inquiry=asked(
                step("clamp", 1.0, 3.0, dtype="bfloat16", min=-0.9999999, max=0.9999999),
                role="self of aten::acos",
            ),
        ),
        "eps_underflow_low_precision",
        (
            "The guard is lost to rounding: clamp with min = -1, max = 1 returned 1, since "
            "bfloat16 has no such number there; acos then meets exactly that value."
        ),
    ),
    (
        case(
            "forward",
            "aten::rsqrt",
            born=AT_ZERO,
            inquiry=asked(
                Ancestor(
                    "aten::clamp", 0.0, "float16", (("self", -1.0), ("min", 1e-8)), (("max", 2.0),)
                )
            ),
        ),
        "eps_underflow_low_precision",
        (
            "The guard is lost to rounding: clamp with max = 2, min = 1e-08 returned 0, since "
            "float16 has no such number there; rsqrt then meets exactly that value."
        ),
    ),
    (
        case(
            "optimizer",
            "aten::addcdiv_",
            born=birth("nan", operand("tensor2", 0.0, zero=2)),
            dtype="float16",
        ),
        "eps_underflow_low_precision",
        "The eps that guards the division is not representable in float16.",
    ),
    (
        case("optimizer", "aten::addcdiv_", born=birth("nan")),
        "optimizer_arithmetic",
        "Gradients are finite; the update that comes after them makes the value itself.",
    ),
    (
        case(
            "backward",
            "aten::sqrt",
            "aten::div",
            birth("nan", operand("self", 0.0, zero=2), operand("other", 0.0, zero=2)),
            after=("MeanBackward0", "WhereBackward0"),
        ),
        "masked_branch_backward",
        (
            "The branch is masked out afterwards, so the gradient that arrives at 2 elements is "
            "exactly 0; the derivative of sqrt is not finite there, and 0 times that is NaN."
        ),
    ),
    (
        case(
            "backward",
            "aten::log",
            "aten::div",
            birth("nan", operand("self", 0.0, zero=2), operand("other", 0.0, zero=2)),
            inquiry=Inquiry(result=float("-inf"), removed_by="aten::nan_to_num"),
        ),
        "masked_branch_backward",
        (
            "The branch is masked out afterwards, so the gradient that arrives at 2 elements is "
            "exactly 0; the derivative of log is not finite there, and 0 times that is NaN."
        ),
    ),
    (
        case(
            "backward",
            "aten::pow",
            "aten::pow",
            birth("inf", operand("self", 0.0, zero=2)),
            inquiry=Inquiry(result=0.0, removed_by="aten::where"),
        ),
        "masked_branch_backward",
        (
            "The branch is masked out afterwards, so the gradient that arrives at 2 elements is "
            "exactly 0; the derivative of pow is not finite there, and 0 times that is NaN."
        ),
    ),
    (
        case("forward", "aten::log", born=AT_ZERO, inquiry=asked(UNDERFLOWN)),
        "underflow_to_zero",
        (
            "exp of -200 is too small for float32 and became exactly 0; the program then takes "
            "its log (2 elements)."
        ),
    ),
    (
        case(
            "forward",
            "aten::div",
            born=DIVIDES,
            inquiry=asked(
                step("sum", 0.0, 0.0), step("mul", 0.0, 1e-30, 3e-20, dtype="float32"), role="other"
            ),
        ),
        "underflow_to_zero",
        (
            "mul of 1e-30, 3e-20 is too small for float32 and became exactly 0; the program then "
            "divides by it (2 elements)."
        ),
    ),
    (
        case(
            "forward",
            "aten::log",
            born=AT_ZERO,
            inquiry=asked(step("where", 0.0, 1e-9), step("scalar_tensor", 0.0)),
        ),
        "underflow_to_zero",
        (
            "where of 1e-09 is too small for float32 and became exactly 0; the program then takes "
            "its log (2 elements)."
        ),
    ),
    (
        case(
            "forward",
            "aten::log",
            born=AT_ZERO,
            inquiry=asked(CANCELLED, is_gone_in_fp64=True),
        ),
        "cancellation",
        (
            "sub of 1 and 1 left 0: the digits in which they differ were rounded away. In FP64 "
            "the step is finite (replayed)."
        ),
    ),
    (
        case(
            "forward",
            "aten::sqrt",
            born=birth("nan", operand("self", -0.25)),
            inquiry=asked(step("sub", -0.25, 4194304.0, 4194304.25), is_gone_in_fp64=True),
        ),
        "cancellation",
        (
            "sub of 4194304 and 4194304.25 left -0.25: the digits in which they differ were "
            "rounded away. In FP64 the step is finite (replayed)."
        ),
    ),
    (
        case(
            "backward",
            "aten::sqrt",
            "aten::div",
            birth("inf", operand("self", 1.0), operand("other", 0.0, zero=1), count=1),
        ),
        "infinite_derivative_at_boundary",
        (
            "The derivative of sqrt is infinite at 0, and 1 element of its argument stands exactly "
            "there."
        ),
    ),
    (
        case(
            "backward",
            "aten::mean",
            "aten::div",
            birth("nan", operand("self", 0.0, zero=3), operand("other", 0.0, zero=3), count=3),
        ),
        "zero_denominator_in_backward",
        (
            "In 3 elements the formula of its backward divides 0/0: the divisor is exactly 0 in 3 "
            "of them."
        ),
    ),
    (
        case(
            "backward",
            "aten::sqrt",
            "aten::div",
            birth("nan", operand("self", 0.0, zero=2), operand("other", 0.0, zero=2)),
        ),
        "infinite_derivative_at_boundary",
        (
            "The derivative of sqrt is infinite at 0, and 2 elements of its argument stand exactly "
            "there."
        ),
    ),
    (
        case(
            "backward",
            "aten::div",
            born=DIVIDES,
            is_hook=True,
            after=("WhereBackward0",),
        ),
        "zero_denominator_in_backward",
        ("In 2 elements it divides a finite number by 0: the divisor is exactly 0 in 2 of them."),
    ),
    (
        case("backward", "aten::mean", "aten::div", DIVIDES),
        "zero_denominator_in_backward",
        (
            "In 2 elements the formula of its backward divides a finite number by 0: the divisor "
            "is exactly 0 in 2 of them."
        ),
    ),
    (
        case("backward", "aten::prod", "aten::mul", birth("nan")),
        "infinite_derivative_at_boundary",
        (
            "The derivative of prod is infinite at 0, and 2 elements of its argument stand exactly "
            "there."
        ),
    ),
    (
        case("forward", "aten::div", born=birth("inf", operand("other", 0.0, zero=1), count=1)),
        "zero_denominator_forward",
        "In 1 element it divides a finite number by 0: the divisor is exactly 0 there.",
    ),
    (
        case("forward", "aten::reciprocal", born=birth("inf", operand("self", 0.0, zero=2))),
        "zero_denominator_forward",
        "In 2 elements it divides a finite number by 0: the divisor is exactly 0 in 2 of them.",
    ),
    (
        case("forward", "aten::native_batch_norm", born=birth("nan", scalars=(("eps", 0.0),))),
        "zero_denominator_forward",
        (
            "native_batch_norm divides by the spread, which is 0 here, and eps = 0 does not "
            "prevent it."
        ),
    ),
    (
        case("forward", "aten::mul", born=birth("inf", operand("self", 300.0)), dtype="float16"),
        "overflow_low_precision",
        (
            "The result does not fit float16, whose largest number is 65504; it became infinite in "
            "2 elements."
        ),
    ),
    (
        case("forward", "aten::exp", born=birth("inf", operand("self", 90.0, 91.5, 90.0))),
        "overflow_exp",
        "exp of (90, 91.5) does not fit float32.",
    ),
    (
        case("forward", "aten::exp", born=birth("inf"), dtype="float64"),
        "overflow_exp",
        "exp of a large number does not fit float64.",
    ),
    (
        case("forward", "aten::log", born=birth("inf", operand("self", 0.0, zero=2))),
        "pole",
        "log is infinite at its argument (0) in 2 elements.",
    ),
    (
        case("forward", "aten::log", born=birth("nan", operand("self", -1.0, -0.25))),
        "domain_error",
        "log is real only for x > 0; 2 elements of its argument lie outside (-1, -0.25).",
    ),
    (
        case("forward", "aten::acos", born=birth("nan", operand("self", 1.5), count=1)),
        "domain_error",
        "acos is real only for -1 ≤ x ≤ 1; 1 element of its argument lies outside (1.5).",
    ),
    (
        case(
            "backward",
            "aten::pow",
            "aten::log",
            birth("nan", operand("self", -0.5, 2.0)),
            node="PowBackward1",
        ),
        "domain_error",
        (
            "The backward of pow takes a log: log is real only for x > 0; 2 elements of its "
            "argument lie outside (-0.5, 2)."
        ),
    ),
    (
        case("backward", "aten::linalg_inv_ex", "aten::mm", None, node="LinalgInvExBackward0"),
        "singular_matrix",
        "The matrix is singular: the system has no solution, or its determinant is 0.",
    ),
    (
        case("forward", "aten::special_i0", born=birth("inf", operand("self", 120.0))),
        "overflow_exp",
        "special_i0 of (120) does not fit float32.",
    ),
    (
        case(
            "forward",
            "aten::sub",
            born=birth("nan", from_asked=True),
            inquiry=asked(step("amax", float("-inf"), float("-inf")), role="other"),
        ),
        "fully_masked_reduction",
        (
            "Every entry of a row is -inf, as a mask has it, and sub of such a row is NaN (2 "
            "elements)."
        ),
    ),
    (
        case("data", "gradient"),
        "bad_data",
        (
            "The gradient was there before the backward began: an earlier one left it in .grad and "
            "nobody zeroed it, or it was handed to backward()."
        ),
    ),
    (
        case("forward", "aten::_weight_norm_interface", born=birth("nan")),
        "zero_denominator_forward",
        "It divides by the norm of the weight, which is 0 here, and takes no eps.",
    ),
    (
        case("forward", "aten::mul", born=birth("nan", from_asked=True)),
        "inf_minus_inf_or_zero_times_inf",
        "An infinity that was let stand meets 0 or another infinity here, which is NaN.",
    ),
    (
        case("backward", "aten::mul", born=None),
        "inf_minus_inf_or_zero_times_inf",
        "An infinity that was let stand meets 0 or another infinity here, which is NaN.",
    ),
    (
        case("forward", "aten::pow", born=birth("inf", operand("self", 1e30))),
        "overflow_fp32",
        "Finite operands, and a result beyond the range of float32 in 2 elements.",
    ),
    (
        case(
            "forward",
            "aten::_scaled_dot_product_flash_attention_for_cpu",
            born=birth("nan"),
            inquiry=Inquiry(inner="aten::bmm", is_inner_overflow=True),
        ),
        "overflow_fp32",
        (
            "Finite operands, and a result beyond the range of float32 in 2 elements (inside it, "
            "bmm)."
        ),
    ),
    (
        case("backward", "aten::mul", born=birth("inf"), dtype="complex64"),
        "overflow_fp32",
        "Finite operands, and a result beyond the range of complex64 in 2 elements.",
    ),
]


@pytest.mark.parametrize(("circumstance", "slug", "sentence"), CASES)
def test_cause(circumstance, slug, sentence):
    """The first row that matches names the cause and tells the numbers of the case."""
    cause = known_cause(circumstance)
    assert cause is not None
    assert (cause.slug, cause.reason(circumstance)) == (slug, sentence)


NEGATIVE_POWERS = [
    (
        case(
            "forward",
            "aten::pow",
            born=birth("inf", operand("self", 0.0, zero=2), scalars=(("exponent", -0.5),)),
        ),
        "zero_denominator_forward",
        "In 2 elements it raises 0 to a negative power, which divides by 0.",
    ),
    (
        case(
            "forward",
            "aten::pow",
            born=birth("inf", operand("self", 0.0, zero=2), operand("exponent", -1.0, -2.0)),
        ),
        "zero_denominator_forward",
        "In 2 elements it raises 0 to a negative power, which divides by 0.",
    ),
]
VARIANCE = Operand("running_var", TensorFacts((3,), "float32"), smallest=-0.01, largest=1.0)
SPOILED = [
    (
        case(
            "forward",
            "aten::native_batch_norm",
            born=birth("nan", VARIANCE, scalars=(("eps", 1e-5),)),
        ),
        "domain_error",
        (
            "native_batch_norm takes the root of running_var + eps, and running_var is negative: "
            "-0.01 at the least. A variance is not: the buffer was spoiled before."
        ),
    ),
    (
        case("optimizer", "aten::div", born=birth("inf", operand("other", 0.0, zero=2))),
        "optimizer_arithmetic",
        (
            "Gradients are finite; the update that comes after them makes the value itself. In 2 "
            "elements it divides a finite number by 0: the divisor is exactly 0 in 2 of them."
        ),
    ),
]


TOLD = [
    (
        case("forward", "aten::asin", born=birth("nan", operand("self", 1.00000012, -1.5))),
        "domain_error",
        (
            "asin is real only for -1 ≤ x ≤ 1; 2 elements of its argument lie outside (1.00000012, "
            "-1.5)."
        ),
    ),
    (
        case("backward", "aten::pow", "aten::pow", is_kept_nan=True),
        "masked_branch_backward",
        (
            "The backward of pow meets NaN that the forward had left and masked out afterwards: "
            "the gradient that arrives there is exactly 0, and 0 times that is NaN."
        ),
    ),
    (
        case(
            "backward",
            "aten::reciprocal",
            "aten::mul",
            inquiry=Inquiry(result=float("inf"), removed_by="aten::where"),
        ),
        "masked_branch_backward",
        (
            "The backward of reciprocal meets an infinity that the forward had left and masked out "
            "afterwards: the gradient that arrives there is exactly 0, and 0 times that is NaN."
        ),
    ),
    (
        case("forward", "aten::div", born=birth("nan", operand("other", 0.0, zero=1), count=1)),
        "zero_denominator_forward",
        "In 1 element it divides 0/0: the divisor is exactly 0 there.",
    ),
    (
        case(
            "forward",
            "aten::log",
            born=AT_ZERO,
            dtype="float16",
            inquiry=asked(step("_to_copy", 0.0, 6e-9, dtype="float16")),
        ),
        "underflow_to_zero",
        (
            "A cast of 6e-09 is too small for float16 and became exactly 0; the program then takes "
            "its log (2 elements)."
        ),
    ),
    (
        case(
            "optimizer",
            "aten::add_",
            born=birth("nan", operand("other", 0.0, zero=2), scalars=(("alpha", float("-inf")),)),
        ),
        "optimizer_arithmetic",
        (
            "Gradients are finite; the update that comes after them makes the value itself. It is "
            "given alpha = -inf."
        ),
    ),
]


@pytest.mark.parametrize(("circumstance", "slug", "sentence"), [*NEGATIVE_POWERS, *SPOILED, *TOLD])
def test_what_is_hidden_in_an_op(circumstance, slug, sentence):
    """A power may be a division, a normalisation a root, and an update both."""
    test_cause(circumstance, slug, sentence)


def test_every_row_has_a_case():
    """No row of the table can be broken unseen, or stand behind another one for ever."""
    assert {slug for _, slug, _ in CASES} == {cause.slug for cause in CAUSES}


UNKNOWN = [
    case("forward", ""),
    case("forward", "aten::exp"),
    case("forward", "aten::mul", born=birth("nan")),
    case("backward", "aten::mul", born=birth("nan")),
    case("forward", "aten::div", born=birth("nan", operand("other", 2.0))),
    case("forward", "aten::div", born=birth("nan", Operand("other", FACTS))),
    case("backward", "aten::mul", born=birth("nan"), node="LinalgSolveBackward0"),
    case("forward", "aten::linalg_eigh", born=birth("nan"), node="LinalgEighBackward0"),
    case("forward", "aten::softmax", born=birth("nan")),
    case("backward", "aten::mul", born=birth("inf"), dtype="float8_e4m3fn"),
]


@pytest.mark.parametrize("circumstance", UNKNOWN)
def test_no_cause(circumstance):
    """Where nothing known was measured no cause is named."""
    assert known_cause(circumstance) is None


# What looks like a cause and is another one, or none: a near miss of the row that is named last.
NEAR_MISSES = [
    # A parameter that is NaN, and a buffer, are data where nothing speaks for unwritten memory.
    (case("data", "parameter"), "bad_data", "uninitialised_memory"),
    (case("data", "buffer", is_unwritten=True), "bad_data", "uninitialised_memory"),
    # The update rule has its own rows, and a solver that a hook runs in divides by what it likes.
    (case("optimizer", "aten::linalg_inv_ex", born=birth("nan")), "optimizer_arithmetic",
     "singular_matrix"),
    (case("forward", "aten::linalg_inv_ex"), None, "singular_matrix"),
    (case("forward", "aten::nll_loss_forward"), None, "infeasible_target"),
    (case("forward", "aten::mul", is_asked=True), "inf_minus_inf_or_zero_times_inf",
     "infeasible_target"),
    (case("backward", "aten::linalg_inv_ex", is_kept_nan=True), "masked_branch_backward",
     "singular_matrix"),
    # The derivative by the exponent where the base is 0; a maximum that is a number.
    (case("backward", "aten::pow", "aten::log", birth("nan", operand("self", 0.0, zero=2))),
     "infinite_derivative_at_boundary", "domain_error"),
    (case("forward", "aten::sub", born=birth("nan", from_asked=True),
          inquiry=asked(step("amax", 3.0, 3.0), role="other")),
     "inf_minus_inf_or_zero_times_inf", "fully_masked_reduction"),
    # A softmax whose result was finite.
    (case("backward", "aten::_softmax", "aten::mul", birth("nan"), inquiry=Inquiry(result=0.5)),
     None, "fully_masked_reduction"),
    (case("forward", "aten::reciprocal", born=AT_ZERO), "zero_denominator_forward",
     "zero_loss_scale"),
    (case("optimizer", "aten::reciprocal", born=birth("inf", operand("self", 1e-40))),
     "overflow_fp32", "zero_loss_scale"),
    # A mean of enough numbers that is NaN; a spread without the correction; targets that are not.
    (case("forward", "aten::mean", output=ONE,
          born=birth("nan", Operand("self", TensorFacts((4,), "float32")))),
     None, "empty_reduction"),
    (case("forward", "aten::std", output=ONE,
          born=birth("nan", Operand("self", TensorFacts((1,), "float32")),
                     scalars=(("correction", 0.0),))),
     None, "empty_reduction"),
    (case("forward", "aten::var", output=ONE,
          born=birth("nan", Operand("self", TensorFacts((2,), "float32")))),
     None, "empty_reduction"),
    (case("forward", "aten::mean", output=ONE,
          born=birth("inf", Operand("self", TensorFacts((4,), "float16"))), dtype="float16"),
     "overflow_low_precision", "empty_reduction"),
    (case("forward", "aten::mean", output=ONE,
          born=birth("nan", Operand("self", TensorFacts((0,), "float32", nan=1)))),
     None, "empty_reduction"),
    # A division by a plain 0 of something that is no sum; one of a sum by a tensor.
    (case("forward", "aten::div", output=ONE, inquiry=asked(step("mul", 0.0, 0.0)),
          born=birth("nan", operand("self", 0.0, zero=2), scalars=(("other", 0.0),))),
     "zero_denominator_forward", "empty_reduction"),
    (case("forward", "aten::div", output=ONE, inquiry=asked(step("sum", 0.0, 0.0)),
          born=birth("nan", operand("self", 0.0, zero=2), operand("other", 0.0, zero=2))),
     "zero_denominator_forward", "empty_reduction"),
    # The parameters grew as training lets them; they grew and something else failed.
    (case("forward", "aten::mm", born=birth("inf"), inquiry=Inquiry(growth=99.0)),
     "overflow_fp32", "divergence"),
    (case("forward", "aten::log", born=AT_ZERO, inquiry=Inquiry(growth=1e9)), "pole", "divergence"),
    (case("optimizer", "aten::addcdiv", born=birth("inf"), inquiry=Inquiry(growth=1e9)),
     "overflow_fp32", "divergence"),
    # A large number was added, or an eps that arrived; a bound that held.
    (case("forward", "aten::log", born=AT_ZERO,
          inquiry=asked(step("add", 0.0, -5.0, other=5.0), is_gone_in_fp64=False)),
     "pole", "eps_underflow_low_precision"),
    (case("forward", "aten::log", born=AT_ZERO,
          inquiry=asked(step("add", 0.0, -1e-3, other=1e-3), is_gone_in_fp64=False)),
     "pole", "eps_underflow_low_precision"),
    (case("forward", "aten::log", born=AT_ZERO, inquiry=asked(step("clamp", 0.0, -2.0, min=0.0))),
     "pole", "eps_underflow_low_precision"),
    (case("forward", "aten::mul", born=birth("inf"), dtype="float16",
          inquiry=asked(step("add", 300.0, 300.0, dtype="float16", other=1e-8))),
     "overflow_low_precision", "eps_underflow_low_precision"),
    # The lost guard is on the dividend, which may be 0.
    (case("forward", "aten::div", born=DIVIDES, inquiry=asked(LOST)),
     "zero_denominator_forward", "eps_underflow_low_precision"),
    (case("optimizer", "aten::addcdiv_", born=birth("nan", operand("tensor2", 0.0, zero=2))),
     "optimizer_arithmetic", "eps_underflow_low_precision"),
    # An update that overflows is no division by its eps.
    (case("optimizer", "aten::mul", born=birth("inf")), "overflow_fp32", "optimizer_arithmetic"),
    # The result stays in; nan_to_num hides what an infinity that was asked for became; a hook.
    (case("backward", "aten::sqrt", "aten::div",
          birth("nan", operand("self", 0.0, zero=2), operand("other", 0.0, zero=2)),
          after=("WhereBackward0",), inquiry=Inquiry(result=0.0)),
     "infinite_derivative_at_boundary", "masked_branch_backward"),
    (case("backward", "aten::mul", born=birth("nan", from_asked=True),
          inquiry=Inquiry(result=float("nan"), removed_by="aten::nan_to_num")),
     "inf_minus_inf_or_zero_times_inf", "masked_branch_backward"),
    (case("backward", "aten::mean", "aten::div",
          birth("nan", operand("self", 0.0, zero=2), operand("other", 0.0, zero=2)),
          is_hook=True, inquiry=Inquiry(result=0.0, removed_by="aten::where")),
     "zero_denominator_in_backward", "masked_branch_backward"),
    # A 0 that relu made, or the batch held, or that was multiplied with 0.
    (case("forward", "aten::log", born=AT_ZERO, inquiry=asked(step("relu", 0.0, -3.0))),
     "pole", "underflow_to_zero"),
    (case("forward", "aten::log", born=AT_ZERO, inquiry=asked(step("", 0.0))),
     "pole", "underflow_to_zero"),
    (case("forward", "aten::log", born=AT_ZERO,
          inquiry=asked(step("mul", 0.0, 3.0, 0.0), step("relu", 0.0, -1.0))),
     "pole", "underflow_to_zero"),
    (case("forward", "aten::div", born=DIVIDES, inquiry=asked(UNDERFLOWN)),
     "zero_denominator_forward", "underflow_to_zero"),
    (case("forward", "aten::log", born=birth("nan", operand("self", -1.0)),
          inquiry=asked(UNDERFLOWN)),
     "domain_error", "underflow_to_zero"),
    # FP64 fails too, or was not asked; a difference that is no 0; two zeros.
    (case("forward", "aten::log", born=AT_ZERO, inquiry=asked(CANCELLED, is_gone_in_fp64=False)),
     "pole", "cancellation"),
    (case("forward", "aten::log", born=AT_ZERO, inquiry=asked(CANCELLED)), "pole", "cancellation"),
    (case("forward", "aten::exp", born=birth("inf", operand("self", 99.0)),
          inquiry=asked(step("sub", 99.0, 100.0, 1.0), is_gone_in_fp64=True)),
     "overflow_exp", "cancellation"),
    (case("forward", "aten::log", born=AT_ZERO,
          inquiry=asked(step("sub", 0.0, 0.0, 0.0), is_gone_in_fp64=True)),
     "pole", "cancellation"),
    # A slope that a hook, or the forward, has; an op whose slope is finite everywhere.
    (case("forward", "aten::sqrt", born=birth("nan", operand("self", -1.0))),
     "domain_error", "infinite_derivative_at_boundary"),
    (case("backward", "aten::sigmoid", "aten::mul", birth("inf")),
     "overflow_fp32", "infinite_derivative_at_boundary"),
    # The formula of the backward divides by a small number.
    (case("backward", "aten::mean", "aten::div", birth("inf", operand("other", 1e-38))),
     "overflow_fp32", "zero_denominator_in_backward"),
    # An infinity that the program wrote down and let through, by a logarithm, a pick and a product.
    (case("forward", "aten::_log_softmax", is_asked=True), "infeasible_target",
     "inf_minus_inf_or_zero_times_inf"),
    (case("forward", "aten::mean", is_asked=True), "inf_minus_inf_or_zero_times_inf",
     "infeasible_target"),
    (case("forward", "aten::mean"), None, "inf_minus_inf_or_zero_times_inf"),
    # A segment that is empty, and one that holds NaN.
    (case("forward", "aten::segment_reduce", output=ONE,
          born=birth("nan", Operand("data", TensorFacts((4,), "float32")))),
     "empty_reduction", "domain_error"),
    (case("forward", "aten::segment_reduce", output=ONE,
          born=birth("nan", Operand("data", TensorFacts((4,), "float32", nan=1)))),
     None, "empty_reduction"),
    # A power of a large number, one of a small number, and the slope of a power at 0.
    (case("forward", "aten::pow",
          born=birth("inf", operand("self", 1e30), scalars=(("exponent", 2.0),))),
     "overflow_fp32", "zero_denominator_forward"),
    (case("forward", "aten::pow",
          born=birth("inf", operand("self", 1e-30), scalars=(("exponent", -2.0),))),
     "overflow_fp32", "zero_denominator_forward"),
    (case("backward", "aten::pow", "aten::pow",
          birth("inf", operand("self", 0.0, zero=2), scalars=(("exponent", -0.5),))),
     "infinite_derivative_at_boundary", "zero_denominator_in_backward"),
    # A variance that eps makes positive again, and one that is.
    (case("forward", "aten::native_batch_norm",
          born=birth("nan", Operand("running_var", FACTS, smallest=-1e-6, largest=1.0),
                     scalars=(("eps", 1e-5),))),
     None, "domain_error"),
    (case("forward", "aten::native_batch_norm",
          born=birth("nan", Operand("running_var", FACTS, smallest=0.5, largest=1.0),
                     scalars=(("eps", 1e-5),))),
     None, "domain_error"),
    # Batch norm with an eps; a layer norm that overflows.
    (case("forward", "aten::native_batch_norm", born=birth("nan", scalars=(("eps", 1e-5),))),
     None, "zero_denominator_forward"),
    (case("forward", "aten::native_layer_norm", born=birth("inf", scalars=(("eps", 1e-5),))),
     "overflow_fp32", "zero_denominator_forward"),
    # Inside a fused kernel something failed that was no overflow.
    (case("forward", "aten::_scaled_dot_product_flash_attention_for_cpu", born=birth("nan"),
          inquiry=Inquiry(inner="aten::_softmax")),
     None, "overflow_fp32"),
]  # fmt: skip


@pytest.mark.parametrize(("circumstance", "slug", "near"), NEAR_MISSES)
def test_near_miss(circumstance, slug, near):
    """One thing less than the row needs, and it names another cause or none."""
    cause = known_cause(circumstance)
    assert (cause.slug if cause else None) == slug
    assert slug != near
    assert near in {row.slug for row in CAUSES}


@pytest.mark.parametrize(
    ("incoming", "after"),
    [((0.0, 1), ("WhereBackward0",)), ((0.0, 2), ("MeanBackward0",)), ((0.0, 2), ())],
)
def test_masked_branch_needs_a_mask_and_a_gradient_of_zero(incoming, after):
    """A gradient that is 0 in some elements only, or no mask, is not the masked branch."""
    value, zero = incoming
    born = birth("nan", operand("self", value, zero=zero), operand("other", 0.0, zero=2))
    cause = known_cause(case("backward", "aten::sqrt", "aten::div", born, after=after))
    assert cause is not None
    assert cause.slug == "infinite_derivative_at_boundary"


def test_what_removed_a_result_counts_where_its_value_is_gone():
    """An op in place leaves nothing of the result that it took out."""
    born = birth("inf", operand("self", 0.0, zero=2))
    inquiry = Inquiry(removed_by="aten::index_put_")
    cause = known_cause(case("backward", "aten::pow", "aten::pow", born, inquiry=inquiry))
    assert cause is not None
    assert cause.slug == "masked_branch_backward"


# -- how a number came to be -----------------------------------------------------------------------

CHAINS = [
    ("exact", []),
    ("given", [step("", 0.0)]),
    ("given", [step("clone", 0.0, 0.0), step("", 0.0)]),
    ("exact", [step("relu", 0.0, -3.0)]),
    ("exact", [step("zeros", 0.0)]),
    # underflow
    ("underflow", [UNDERFLOWN]),
    ("underflow", [step("sum", 0.0, 0.0), step("_softmax", 0.0, -150.0)]),
    ("underflow", [step("mul", 0.0, 1e-30, 1e-30)]),
    ("underflow", [step("mul", 0.0, 1e-30, other=1e-30)]),
    ("underflow", [step("prod", 0.0, 1e-3)]),
    ("underflow", [step("cat", 0.0, 0.0), step("_to_copy", 0.0, 6e-9, dtype="float16")]),
    ("exact", [step("_to_copy", 0.0, float("nan"), dtype="float16")]),
    ("given", [step("_to_copy", 0.0, 0.0, dtype="float16"), step("", 0.0)]),
    ("underflow", [step("where", 0.0, 1e-9, 0.0), step("zeros_like", 0.0, 1e-9)]),
    # The tiny number is what the other elements get, and the 0 was computed, or given.
    ("given", [step("where", 0.0, 1e-9), step("", 0.0)]),
    ("exact", [step("mul", 0.0, 1e-30, 0.0)]),
    ("exact", [step("mul", 0.0, 1e-30, other=0.0)]),
    ("exact", [step("mul", 0.0)]),
    ("exact", [step("exp", 0.0, float("-inf"))]),
    ("exact", [step("div", 0.0, 1.0, float("inf"))]),
    ("exact", [step("exp", 1e-30, -69.0)]),
    ("exact", [step("where", 0.0, 3.0, 0.0)]),
    ("exact", [step("round", 0.0, 0.2)]),
    # difference
    ("difference", [CANCELLED]),
    ("difference", [step("rsub", 0.0, 1.0, other=1.0)]),
    ("difference", [step("add", 0.0, -5.0, 5.0)]),
    ("difference", [step("clamp", 0.0, 0.0, min=0.0), step("sub", 0.0, 2.0, 2.0)]),
    ("difference", [step("add", 0.0, -1e-3, other=1e-3)]),
    ("exact", [step("sub", 0.0, 0.0, 0.0)]),
    # guard
    ("guard", [LOST]),
    ("guard", [step("add_", 0.0, dtype="float16", other=1e-8)]),
    ("guard", [step("add", 1.0, 1.0, other=1e-9)]),
    ("guard", [step("sqrt", 0.0, 0.0), LOST, step("relu", 0.0, -1.0)]),
    ("guard", [step("clamp_min", 0.0, 0.0, dtype="float16", min=1e-8)]),
    ("guard", [step("clamp", 1.0, 4.0, dtype="bfloat16", max=0.9999999)]),
    # No eps would have helped a negative number.
    ("difference", [step("add", -0.7, -0.7, other=1e-9)]),
    ("difference", [step("add", 1e20, 1e20, other=1.0)]),
    ("difference", [step("add", 0.0, 0.0, other=1.0)]),
    ("difference", [step("add_", 0.5, other=1e-8)]),
    ("exact", [step("clamp", 0.0, -3.0, min=0.0)]),
    ("exact", [step("clamp", 1.0, 4.0, min=-1.0, max=1.0)]),
]


@pytest.mark.parametrize(("how", "chain"), CHAINS)
def test_making(how, chain):
    """The chain of ops tells how the number at its near end came to be."""
    assert making(chain) == how
    assert (lost_guard(chain) is not None) == (how == "guard")


def test_the_guard_that_was_lost_is_named():
    """The nearest one, not the op that made the number before it."""
    chain = [step("sqrt", 0.0, 0.0), LOST, step("relu", 0.0, -1.0)]
    assert lost_guard(chain) is LOST


def test_a_difference_is_worth_a_replay_in_fp64():
    """Any operand that a difference made, and no other."""
    assert is_difference(asked(CANCELLED))
    assert is_difference(Inquiry((("self", (UNDERFLOWN,)), ("other", (CANCELLED,)))))
    assert not is_difference(asked(UNDERFLOWN))
    assert not is_difference(asked(LOST))
    assert not is_difference(Inquiry())


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, -0.5])
def test_what_an_op_can_fail_at_is_critical(value):
    """0, ±1, and a negative number where the op needs a positive one."""
    chain = (step("sub", value, 2.0, 2.0 - value),)
    inquiry = asked(*chain, is_gone_in_fp64=True)
    log = case("forward", "aten::log", born=birth("nan", operand("self", value)), inquiry=inquiry)
    assert known_cause(log).slug == "cancellation"
    acos = replace(log, op="aten::acos", formula_op="aten::acos")
    assert known_cause(acos).slug == ("domain_error" if value == -0.5 else "cancellation")


def test_chain_of_an_inquiry():
    """The lineage of the first of several operands that has one."""
    inquiry = Inquiry((("other", (LOST,)), ("min", (CANCELLED,))))
    assert inquiry.chain("self", "other", "min") == (LOST,)
    assert inquiry.chain("min") == (CANCELLED,)
    assert inquiry.chain("self") == ()


# -- by op -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "slugs"),
    [
        (
            "log",
            [
                "eps_underflow_low_precision",
                "underflow_to_zero",
                "cancellation",
                "inf_minus_inf_or_zero_times_inf",
                "infinite_derivative_at_boundary",
                "masked_branch_backward",
                "pole",
                "domain_error",
            ],
        ),
        ("aten::_linalg_svd", ["degenerate_decomposition"]),
        ("linalg_eigh", ["degenerate_decomposition"]),
        ("addcdiv_", ["eps_underflow_low_precision", "optimizer_arithmetic",
                      "zero_denominator_in_backward", "zero_denominator_forward"]),
        ("logsumexp", ["fully_masked_reduction", "inf_minus_inf_or_zero_times_inf"]),
        ("view", []),
        ("", []),
    ],
)  # fmt: skip
def test_causes_of_an_op(op, slugs):
    """In the order of the table, however the op is written."""
    order = [cause.slug for cause in CAUSES]
    assert [cause.slug for cause in causes_of(op)] == sorted(slugs, key=order.index)


# Causes that no op is known for.
OF_NO_OP = {
    "uninitialised_memory", "bad_data", "custom_function_bug", "zero_loss_scale", "divergence",
    "received_from_another_rank",
}  # fmt: skip


def test_every_cause_that_an_op_is_known_for_has_a_row():
    """What is looked up is found; only causes that no op of its own has may be left out."""
    slugs = {cause.slug for cause in CAUSES}
    assert set(_KNOWN_FOR) <= slugs
    assert slugs - set(_KNOWN_FOR) == OF_NO_OP
    assert all(base_name(op) == op for ops in _KNOWN_FOR.values() for op in ops)


@pytest.mark.parametrize(("circumstance", "slug", "_"), CASES)
def test_what_a_case_names_is_known_of_its_op(circumstance, slug, _):
    """Whoever looks the op of a report up finds its cause; but for rules that any op may break."""
    if slug in OF_NO_OP:
        return
    names = {circumstance.base, circumstance.formula}
    known = {cause.slug for name in names for cause in causes_of(name)}
    assert slug in known or slug.startswith("overflow")


def test_slugs_are_unique():
    """A slug names one cause, and both texts about it are sentences."""
    slugs = [cause.slug for cause in CAUSES]
    assert len(set(slugs)) == len(slugs)
    assert [cause.slug for cause in CAUSES if not (cause.title and cause.about[-1] == ".")] == []


def test_every_cause_has_its_section():
    """`docs/causes.md` has one section for each slug, in the order of the table, and no other."""
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    assert [line[3:] for line in lines if line.startswith("## ")] == [c.slug for c in CAUSES]


@pytest.mark.parametrize(
    ("op", "base"),
    [
        ("aten::_linalg_eigh", "linalg_eigh"),
        ("aten::div_", "div"),
        ("my::ns::op", "op"),
        ("exp", "exp"),
    ],
)
def test_base_name(op, base):
    """Namespace, leading underscores and the in-place mark are left out."""
    assert base_name(op) == base


def test_matrices_are_samples_where_there_is_one_for_each():
    """A decomposition of one matrix per sample is told in samples."""
    assert [matrices_or_samples(TIED, n) for n in (64, 8, None)] == ["samples"] + ["matrices"] * 2
