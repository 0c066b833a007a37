"""Measurement: the screen, the counts, the operands of a birth, the spectrum."""

import math
import warnings

import pytest
import torch

from nanhunt import measurement
from nanhunt.records import TensorFacts

INF, NAN = math.inf, math.nan
REALS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPLEXES = (torch.complex64, torch.complex128)
FLOAT8 = (
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)


def complex_half(values):
    """A complex32 tensor; torch warns of the dtype itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.tensor(values, dtype=torch.complex64).to(torch.complex32)


def at_the_end(value, dtype, size=37):
    """Ones, and `value` in the last place."""
    return torch.tensor([1.0] * (size - 1) + [value]).to(dtype)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [*REALS, *COMPLEXES])
def test_one_nonfinite_element_is_never_missed(dtype, value):
    """One NaN or infinity is suspect and counted in contiguous and strided tensors alike."""
    bad = at_the_end(value, dtype)
    grid = bad.repeat(4, 1)
    for tensor in (bad, bad[-1], bad.flip(0)[::2], grid.t(), grid[:, 1:], bad.expand(3, 37)):
        assert measurement.is_suspect(tensor)
        assert measurement.count(tensor).nonfinite == int((~torch.isfinite(tensor)).sum())
    fine = at_the_end(2.0, dtype)
    assert measurement.count(fine) == TensorFacts((37,), measurement.dtype_name(dtype))
    assert not measurement.is_suspect(fine)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_nan_is_counted_in_every_float8(dtype):
    """The dtypes that numpy does not know are counted all the same."""
    name = measurement.dtype_name(dtype)
    assert measurement.count(at_the_end(NAN, dtype)) == TensorFacts((37,), name, nan=1)
    assert measurement.count(at_the_end(1.0, dtype)).is_finite
    assert measurement.nonfinite_mask(at_the_end(NAN, dtype)).tolist() == [False] * 36 + [True]
    assert measurement.kind_of(at_the_end(NAN, dtype)) == "nan"


def test_nan_is_counted_in_complex32():
    """The complex number of two halves."""
    assert measurement.count(complex_half([1.0, complex(1.0, NAN)])).nan == 1
    assert measurement.count(complex_half([1.0, complex(6e4, 6e4)])).is_finite


def test_signs_and_nan_are_counted_apart():
    """NaN, +inf and -inf each have a count of their own."""
    tensor = torch.tensor([[NAN, INF, 1.0], [-INF, -INF, 0.0]])
    facts = measurement.count(tensor)
    assert facts == TensorFacts((2, 3), "float32", nan=1, posinf=1, neginf=2)
    assert (facts.nonfinite, facts.numel, facts.is_finite) == (4, 6, False)


def test_complex_elements_are_counted_once():
    """An element with two non-finite parts is one; NaN in a part makes it NaN."""
    parts = [complex(NAN, INF), complex(0, -INF), complex(INF, 1), complex(1, 1)]
    facts = measurement.count(torch.tensor(parts))
    assert (facts.nan, facts.posinf, facts.neginf) == (1, 2, 0)


def test_opposite_infinities_do_not_cancel():
    """A sum of inf and -inf is NaN, and so still suspect."""
    for dtype in REALS:
        tensor = torch.tensor([INF, -INF, 0.0, 0.0]).to(dtype)
        assert measurement.count(tensor).nonfinite == 2
        assert measurement.count(tensor[:2].repeat(2, 2).t()).nonfinite == 8


@pytest.mark.parametrize("dtype", [*REALS, *COMPLEXES])
def test_large_finite_values_are_not_counted(dtype):
    """The largest numbers of a dtype overflow the screen's sum, never its verdict."""
    largest = torch.finfo(dtype).max
    tensor = torch.full((64,), largest, dtype=dtype)
    assert measurement.count(tensor).is_finite
    assert measurement.count(torch.cat([tensor, tensor.neg()]).reshape(2, 64).t()).is_finite


def test_conjugate_and_negative_views():
    """Lazy views are read as the numbers that they stand for."""
    values = torch.tensor([complex(1, 2), complex(3, INF)])
    assert values.conj().is_conj()
    assert measurement.count(values.conj()).posinf == 1
    assert values.conj().imag.is_neg()
    assert measurement.count(values.conj().imag).neginf == 1
    assert measurement.count(values[:1].conj()).is_finite
    assert measurement.nonfinite_mask(values.conj()).tolist() == [False, True]


def test_empty_integer_meta_and_scalar_tensors():
    """What holds no element, or no floating one, is finite; a scalar is looked at."""
    assert measurement.count(torch.empty(0, 3)) == TensorFacts((0, 3), "float32")
    assert measurement.count(torch.tensor([1, 2])) == TensorFacts((2,), "int64")
    assert measurement.count(torch.empty(2, device="meta")) == TensorFacts((2,), "float32")
    assert measurement.count(torch.tensor(NAN)) == TensorFacts((), "float32", nan=1)


def test_tensors_that_require_a_gradient():
    """Counting one takes no part in any graph."""
    leaf = torch.tensor([1.0, NAN], requires_grad=True)
    assert measurement.count(leaf).nan == measurement.count(leaf * 2).nan == 1
    assert measurement.count((leaf * 2)[:1]).is_finite
    assert measurement.nonfinite_mask(leaf).tolist() == [False, True]


def test_sparse_tensors_are_counted_by_their_values():
    """COO, coalesced or not, and CSR."""
    index, values = torch.tensor([[0, 0], [1, 1]]), torch.tensor([1.0, NAN])
    coo = torch.sparse_coo_tensor(index, values, (2, 2), check_invariants=True)
    assert not coo.is_coalesced()
    assert measurement.count(coo) == TensorFacts((2, 2), "float32", nan=1)
    assert measurement.count(coo.coalesce()).nan == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        csr = torch.tensor([[0.0, -INF], [1.0, 0.0]]).to_sparse_csr()  # torch calls it a beta
    assert measurement.count(csr).neginf == 1


def test_kinds_and_first_indices():
    """A birth quotes what its values are and where the first four stand."""
    assert measurement.kind_of(torch.tensor([NAN, NAN])) == "nan"
    assert measurement.kind_of(torch.tensor([INF, -INF])) == "inf"
    assert measurement.kind_of(torch.tensor([NAN, -INF])) == "nan and inf"
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[0, 2] = mask[1, 0] = True
    assert measurement.first_indices(mask) == ((0, 2), (1, 0))
    assert len(measurement.first_indices(torch.ones(9, dtype=torch.bool))) == 4
    assert measurement.first_indices(torch.tensor(True)) == ((),)
    assert measurement.leading_count(mask) == 2
    assert measurement.leading_count(torch.tensor([[True, True], [False, False]])) == 1
    assert measurement.leading_count(torch.tensor(True)) is None


def test_operand_is_read_at_the_offending_elements():
    """Values at the mask are apart from those of the whole tensor."""
    mask = torch.tensor([[True, False, True], [False, True, False]])
    values = torch.tensor([[0.0, 5.0, -2.0], [7.0, 1.0, 0.0]])
    operand = measurement.read_operand("self", values, mask)
    assert operand.at == (0.0, -2.0, 1.0)
    assert (operand.at_zero, operand.at_negative, operand.at_one) == (1, 1, 1)
    assert (operand.smallest, operand.largest, operand.zeros) == (-2.0, 7.0, 2)
    assert operand.smallest_normal == torch.finfo(torch.float32).smallest_normal


@pytest.mark.parametrize("shape", [(), (3,), (1, 3), (2, 1)])
def test_operand_is_broadcast_over_the_output(shape):
    """An operand smaller than the output is read as the op read it."""
    mask = torch.tensor([[True, False, True], [False, True, False]])
    operand = measurement.read_operand("other", torch.zeros(shape), mask)
    assert operand.at_zero == 3


def test_operand_that_cannot_be_laid_over_the_output():
    """A matrix product's operand has a range but no values there."""
    operand = measurement.read_operand("mat2", torch.ones(5, 3), torch.ones(2, 3).bool())
    assert (operand.at, operand.at_zero, operand.at_negative) == ((), None, None)
    assert (operand.smallest, operand.largest) == (1.0, 1.0)


def test_operand_of_any_dtype():
    """Complex by magnitude, half in single, booleans and integers as numbers, non-finite aside."""
    every = torch.ones(2).bool()
    assert measurement.read_operand("z", torch.tensor([3 + 4j, -1j]), every).at == (5.0, 1.0)
    assert measurement.read_operand("h", torch.tensor([6e4, 0.0]).half(), every).largest == 60_000
    assert measurement.read_operand("m", torch.tensor([True, False]), every).at_zero == 1
    assert measurement.read_operand("n", torch.tensor([-3, 4]), every).smallest == -3.0
    operand = measurement.read_operand("x", torch.tensor([INF, 2.0]), every)
    assert (operand.smallest, operand.largest, operand.facts.posinf) == (2.0, 2.0, 1)
    assert measurement.read_operand("e", torch.empty(0), None).smallest is None


def test_newborn_elements_are_those_with_finite_inputs():
    """What a pointwise op passed on is no birth of its own."""
    output = torch.tensor([NAN, INF, 1.0])
    seen = torch.tensor([True, False, False])
    assert measurement.newborn_mask(output, [seen]).tolist() == [False, True, False]
    assert measurement.newborn_mask(output, [torch.tensor(True)]).tolist() == [False] * 3
    assert measurement.newborn_mask(output, [torch.ones(5).bool()]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spectrum_counts_ties_gaps_and_rank(dtype):
    """Only bit-identical neighbours tie; rank counts what stands above the floor."""
    tied = [1.0, 1.0, 1.0, 5.0, 7.0]
    near = [1.0, 1.0 + torch.finfo(dtype).eps, 2.0, 5.0, 7.5]
    spectrum = measurement.read_spectrum(torch.tensor([tied, near, near], dtype=dtype))
    assert (spectrum.matrices, spectrum.size) == (3, 5)
    assert (spectrum.tied, spectrum.largest_tie, spectrum.smallest_gap) == (1, 3, 0.0)
    assert (spectrum.floor, spectrum.above_floor, spectrum.largest) == (1.0, 3, 7.5)
    apart = measurement.read_spectrum(torch.tensor(near, dtype=dtype))
    assert (apart.tied, apart.largest_tie) == (0, 1)
    assert apart.smallest_gap == torch.finfo(dtype).eps


def test_spectrum_of_a_low_rank_matrix():
    """Descending singular values are read like ascending eigenvalues, complex matrices as well."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(4, 12, 3, dtype=torch.complex64, generator=generator)
    matrix = factor @ factor.mH + 0.01 * torch.eye(12)
    for values in (torch.linalg.eigvalsh(matrix), torch.linalg.svdvals(matrix)):
        spectrum = measurement.read_spectrum(values)
        assert (spectrum.matrices, spectrum.size, spectrum.above_floor) == (4, 12, 3)
        assert spectrum.floor == pytest.approx(0.01, rel=1e-2)


def test_what_has_no_spectrum():
    """A scalar, no values, complex eigenvalues; a single value has no gap."""
    assert measurement.read_spectrum(torch.tensor(1.0)) is None
    assert measurement.read_spectrum(torch.empty(2, 0)) is None
    assert measurement.read_spectrum(torch.tensor([1j, 2.0])) is None
    single = measurement.read_spectrum(torch.tensor([[2.0]]))
    assert (single.tied, single.smallest_gap) == (0, INF)


def test_memory_that_was_given_back_is_not_read():
    """As that of whole parameters under `fully_shard`, between their uses."""
    gone = torch.full((3, 4), torch.nan)
    gone.untyped_storage().resize_(0)
    assert measurement.suspects([gone, torch.tensor([torch.nan])]) == [1]
    assert measurement.count(gone).is_finite
    assert measurement.read_operand("weight", gone, None).smallest is None
