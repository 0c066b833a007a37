"""Each cause of the table on its own circumstance, and what it must not match."""

from pathlib import Path

import pytest

from nanhunt.causes import CAUSES, Circumstance, base_name, known_cause, matrices_or_samples
from nanhunt.records import Birth, Operand, Spectrum, TensorFacts

DOCS = Path(__file__).parents[2] / "docs" / "causes.md"
FACTS = TensorFacts((4,), "float32")
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


# What was measured, the cause that it shows, and its sentence.
CASES = [
    (
        case("data", "input"),
        "bad_data",
        "The value was there before the step began; no operation of the step made it.",
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
        case("forward", "aten::_softmax", born=birth("nan", count=6, from_asked=True)),
        "fully_masked_reduction",
        (
            "Every entry of a row is -inf, as a mask has it, and softmax of such a row is NaN "
            "(6 elements)."
        ),
    ),
    (
        case("optimizer", "aten::addcdiv_", born=birth("nan")),
        "optimizer_arithmetic",
        "Gradients are finite; the update rule itself makes the value (its eps is too small).",
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
        case("backward", "aten::prod", "aten::mul", birth("nan")),
        "zero_denominator_in_backward",
        (
            "The derivative of prod is infinite at 0, and 2 elements of its argument stand exactly "
            "there."
        ),
    ),
    (
        case("forward", "aten::div", born=birth("inf", operand("other", 0.0, zero=1), count=1)),
        "zero_denominator_forward",
        "In 1 element it divides a finite number by 0: the divisor is exactly 0 in 1 of them.",
    ),
    (
        case("forward", "aten::reciprocal", born=birth("inf", operand("self", 0.0, zero=2))),
        "zero_denominator_forward",
        "In 2 elements it divides a finite number by 0: the divisor is exactly 0 in 2 of them.",
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
    assert cause.slug == "zero_denominator_in_backward"


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
