"""Interventions: a step in another precision, and FP16 on a CPU."""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nanhunt.interventions import HalfEmulation, PrecisionRewriting, dtype_under


class Dtypes(TorchDispatchMode):
    """Notes the dtype of every floating number that is computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func.is_view:
            return output
        for value in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(value, torch.Tensor) and (
                value.is_floating_point() or value.is_complex()
            ):
                self.seen.add(value.dtype)
        return output


@contextlib.contextmanager
def in_double():
    """What an FP64 replay enters, with the dtypes that were really computed in."""
    torch.set_default_dtype(torch.float64)
    try:
        with Dtypes() as dtypes, PrecisionRewriting(torch.float64):
            yield dtypes.seen
    finally:
        torch.set_default_dtype(torch.float32)


CONSTANT = torch.tensor([1.0, 2.0, 3.0])

NARROWING = {
    "float": lambda x: x.float().exp(),
    "to": lambda x: x.to(torch.float32).exp(),
    "half": lambda x: x.half().exp(),
    "type": lambda x: x.type(torch.float32).exp(),
    "to another": lambda x: x.to(CONSTANT).exp(),
    "dtype of softmax": lambda x: nn.functional.softmax(x, -1, dtype=torch.float32),
    "dtype of log_softmax": lambda x: nn.functional.log_softmax(x, -1, dtype=torch.float32),
    "dtype of sum": lambda x: x.sum(dtype=torch.float32),
    "dtype of a factory": lambda x: x + torch.ones(3, dtype=torch.float32),
    "dtype of a literal": lambda x: x * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float32),
    "captured": lambda x: x * CONSTANT,
    "captured view": lambda x: x[:2] * CONSTANT[1:],
    "matrix": lambda x: x.float().outer(CONSTANT) @ CONSTANT,
    "complex": lambda x: torch.complex(x.float(), x.float()).to(torch.complex64).abs(),
    "fft": lambda x: torch.fft.rfft(x.float()).abs(),
    "norm": lambda x: nn.functional.layer_norm(x.float(), (3,)),
}


@pytest.mark.parametrize("name", NARROWING)
def test_double_survives_casts_in_user_code(name):
    """Whatever the code casts to, everything is computed in FP64."""
    function = NARROWING[name]
    x = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64, requires_grad=True)
    with in_double() as seen:
        function(x).sum().backward()
    assert seen <= {torch.float64, torch.complex128}
    assert x.grad.dtype == torch.float64
    with Dtypes() as plain:
        function(x.detach().float()).sum()
    assert plain.seen & {torch.float16, torch.float32, torch.complex64}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_double_survives_an_inner_autocast(dtype):
    """Autocast's casts are met below it; the value has FP64's digits."""
    a = torch.full((2, 2), 1.0 + 2.0**-40, dtype=torch.float64)
    with in_double() as seen, torch.autocast("cpu", dtype=dtype):
        product = a @ a
    assert seen == {torch.float64}
    assert product[0, 0] == 2 * (1.0 + 2.0**-40) ** 2


def test_assignment_into_memory_of_either_kind():
    """Values from outside are cast on the way into the step's memory; others keep their dtype."""
    mask = torch.tensor([True, False, True])
    outside = torch.zeros(3)
    with in_double():
        made = torch.zeros(3)
        made[mask] = CONSTANT[:2]
        literal = torch.tensor([0.0, 0.0, 0.0], dtype=torch.float32)
        literal[mask] = made[:2]
        outside[mask] = CONSTANT[:2]
        outside.add_(made)
    assert made.tolist() == [1.0, 0.0, 2.0]
    assert (made.dtype, literal.dtype, outside.dtype) == (*[torch.float64] * 2, torch.float32)
    assert outside.tolist() == [2.0, 0.0, 4.0]


def test_integers_and_booleans_keep_their_dtype():
    """Only floating and complex numbers are rewritten."""
    with in_double():
        assert torch.arange(3, dtype=torch.int32).dtype == torch.int32
        assert (CONSTANT > 1).dtype == torch.bool
    for real in (torch.float32, torch.float64):
        assert dtype_under(torch.bfloat16, real) == real
        assert dtype_under(torch.int64, real) == torch.int64
    assert dtype_under(torch.complex64, torch.float64) == torch.complex128
    assert dtype_under(torch.complex128, torch.float32) == torch.complex64


DRAWS = {
    "dropout": lambda x: nn.functional.dropout(x + 1),
    "dropout2d": lambda x: nn.functional.dropout2d(x.reshape(1, 40, 1, 1)),
    "attention dropout": lambda x: nn.functional.scaled_dot_product_attention(
        *[x.reshape(1, 1, 10, 4)] * 3, dropout_p=0.5
    ),
    "bernoulli": torch.bernoulli,
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(0.3),
    "bernoulli_ of a tensor": lambda x: torch.empty_like(x).bernoulli_(x),
    "rand": lambda x: torch.rand(40),
    "randn": lambda x: torch.randn(40),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "uniform_": lambda x: torch.empty_like(x).uniform_(-1, 1),
    "normal_": lambda x: torch.empty_like(x).normal_(),
    "normal of numbers": lambda x: torch.normal(0.0, 1.0, (40,)),
    "normal of a mean": lambda x: torch.normal(x, 1.0),
    "normal of both": lambda x: torch.normal(x, x + 1),
    "gumbel": lambda x: nn.functional.gumbel_softmax(x, tau=0.5),
    "multinomial": lambda x: torch.multinomial(x + 1, 5).float(),
    "categorical": lambda x: torch.distributions.Categorical(x + 1).sample((20,)).float(),
    "gamma": lambda x: torch.distributions.Gamma(x + 1, x + 1).sample(),
    "randint": lambda x: torch.randint(0, 9, (40,)).float(),
    "complex": lambda x: torch.randn(40, dtype=torch.complex64),
    "complex like": lambda x: torch.randn_like(torch.complex(x, x)),
    "complex in place": lambda x: torch.complex(x, x).clone().normal_(),
    "double on purpose": lambda x: torch.rand(40, dtype=torch.float64),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_agree_across_precisions(name):
    """The same seed gives the same numbers in FP64, and leaves the generator in the same state."""
    x = torch.linspace(0, 1, 40)
    torch.manual_seed(3)
    plain, after = DRAWS[name](x), torch.rand(1)
    torch.manual_seed(3)
    with in_double():
        double = DRAWS[name](x.double())
    assert torch.allclose(double, plain.to(double.dtype), rtol=1e-5, atol=1e-6)
    assert double.dtype in (torch.float64, torch.complex128)
    assert torch.equal(torch.rand(1), after)
    torch.manual_seed(4)
    if name != "categorical":
        assert not torch.allclose(DRAWS[name](x), plain)


def half_model():
    """A net with every kind of product that is emulated."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(32, 8)).half()


def test_half_products_equal_rounded_single_products():
    """Emulated FP16 is FP32 arithmetic on FP16 operands, rounded once to FP16."""
    torch.manual_seed(1)
    a, b, c = (torch.randn(*s).half() for s in ((3, 5, 7), (3, 7, 4), (3, 5, 4)))
    calls = {
        "bmm": (torch.bmm, (a, b)),
        "mm": (torch.mm, (a[0], b[0])),
        "addmm": (torch.addmm, (c[0], a[0], b[0])),
        "baddbmm": (torch.baddbmm, (c, a, b)),
        "mv": (torch.mv, (a[0], b[0, :, 0])),
        "conv1d": (nn.functional.conv1d, (a, torch.randn(2, 5, 3).half())),
    }
    for function, operands in calls.values():
        with HalfEmulation() as mode:
            got = function(*operands)
        assert mode.used
        assert got.dtype == torch.float16
        assert torch.equal(got, function(*(t.float() for t in operands)).half())


def test_half_backward_is_emulated_too():
    """Gradients of a half net are half and near the FP32 ones."""
    model, x = half_model(), torch.randn(2, 4, 8)
    with HalfEmulation() as mode:
        model(x.half()).float().pow(2).sum().backward()
    wide = half_model().float()
    wide(x.half().float()).pow(2).sum().backward()
    assert mode.used
    for half, single in zip(model.parameters(), wide.parameters(), strict=True):
        assert half.grad.dtype == torch.float16
        assert torch.allclose(half.grad.float(), single.grad, rtol=2e-2, atol=2e-2)


def test_half_overflow_stays_an_overflow():
    """A sum beyond 65504 is infinite after rounding, as on a GPU; below it is exact."""
    row = torch.full((1, 256), 16.0).half()
    with HalfEmulation():
        assert torch.isinf(row @ row.t()).item()
        assert (row[:, :255] @ row[:, :255].t()).item() == 65280.0


def test_half_attention_is_emulated():
    """Fused attention returns FP16 values."""
    q = torch.randn(1, 2, 6, 8).half()
    with HalfEmulation() as mode:
        got = nn.functional.scaled_dot_product_attention(q, q, q)
    expected = nn.functional.scaled_dot_product_attention(*[q.float()] * 3)
    assert mode.used
    assert got.dtype == torch.float16
    assert torch.allclose(got.float(), expected, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_other_dtypes_are_left_alone(dtype):
    """Nothing is emulated where no FP16 tensor comes in."""
    a = torch.randn(3, 3, dtype=torch.float32).to(dtype)
    expected = a @ a
    with HalfEmulation() as mode:
        assert torch.equal(a @ a, expected)
    assert not mode.used


def test_out_forms_write_where_they_were_told():
    """An `out=` product fills the tensor that it was given."""
    a, out = torch.ones(2, 2).half(), torch.full((2, 2), 7.0).half()
    with HalfEmulation():
        torch.mm(a, a, out=out)
    assert out.tolist() == [[2.0, 2.0], [2.0, 2.0]]
