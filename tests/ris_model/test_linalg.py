"""Linalg: each function beside its naive twin, which fails."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.autograd.gradcheck import GradcheckError

from ris_model.linalg import (
    at_least_fp32,
    factorise,
    hermitise,
    norm_or_zero,
    project_signal,
    sqrt_or_zero,
)


def draw(*shape: int, dtype: torch.dtype = torch.complex128, seed: int = 0) -> torch.Tensor:
    """Random numbers."""
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def project_naively(matrix: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The projector through plain autograd."""
    vectors = torch.linalg.eigh(matrix).eigenvectors
    side = matrix.shape[-1]
    top = vectors * (torch.arange(side) >= side - count[..., None])[..., None, :]
    return top @ vectors.mH


def project_gradient(project, matrix, count, weight):
    """Gradient of Re tr(W^H P) with respect to the matrix."""
    leaf = matrix.clone().requires_grad_()
    value = (weight.conj() * project(hermitise(leaf), count)).real.sum()
    return torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.complex64),
        (torch.complex128, torch.complex128),
        (torch.int64, torch.int64),
        (torch.bool, torch.bool),
    ],
)
def test_at_least_fp32_raises_half_precision_only(given, wanted):
    """Half becomes single, everything else stays; FP64 is not lowered."""
    assert at_least_fp32(torch.ones(2).to(given)).dtype == wanted


def test_hermitise_makes_eigenvalues_match_finite_differences():
    """The naive one reads one triangle, so its gradient fails the check."""
    x = draw(5, 5).requires_grad_()
    assert gradcheck(lambda z: torch.linalg.eigvalsh(hermitise(z)), (x,))
    with pytest.raises(GradcheckError):
        gradcheck(torch.linalg.eigvalsh, (x,))


def test_hermitise_sees_an_error_that_eigh_overlooks():
    """An entry in the upper triangle changes the Hermitian part, but not what eigh reads."""
    x = torch.eye(3, dtype=torch.complex128)
    x[0, 2] = 1.0
    assert torch.equal(torch.linalg.eigvalsh(x), torch.ones(3, dtype=torch.float64))
    assert torch.linalg.eigvalsh(hermitise(x))[-1].item() == pytest.approx(1.5)


def test_factor_of_one_broken_matrix_leaves_the_others_alone():
    """The naive one raises for the whole batch."""
    matrices = torch.eye(3, dtype=torch.complex128).repeat(3, 1, 1)
    matrices[1, 0, 0] = torch.nan
    matrices[2] *= -1
    found = factorise(matrices)
    assert torch.equal(found[0], torch.eye(3, dtype=torch.complex128))
    assert found[1:].isnan().all()
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(matrices)


def test_sqrt_has_a_finite_gradient_at_zero():
    """The naive root has an infinite gradient at 0, also behind a where."""
    for root, finite in (
        (sqrt_or_zero, True),
        (torch.sqrt, False),
        (lambda v: torch.where(v > 0, v.sqrt(), 0.0), False),
    ):
        x = torch.tensor([0.0, 4.0], requires_grad=True)
        root(x).sum().backward()
        assert x.grad.isfinite().all().item() is finite
        assert x.grad[1] == 0.25
    assert gradcheck(sqrt_or_zero, (torch.tensor([0.3, 2.0]).double().requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_norm_has_a_finite_gradient_at_zero(dtype):
    """The hand-written norm gives NaN at a padded slot, this one 0."""
    gradients = []
    for norm in (norm_or_zero, lambda v: (v.abs() ** 2).sum(-1).sqrt()):
        x = torch.stack((torch.zeros(3, dtype=dtype), draw(3, dtype=dtype))).requires_grad_()
        norm(x).sum().backward()
        gradients.append(x.grad)
    assert gradients[0][0].abs().max() == 0
    assert gradients[1][0].isnan().all()
    assert torch.allclose(gradients[0][1], gradients[1][1])
    assert gradcheck(norm_or_zero, (draw(2, 3, dtype=dtype).requires_grad_(),))


def test_projector_is_a_projector_of_each_sample_s_rank():
    """P P = P, P^H = P, tr P = K, sample by sample."""
    count = torch.tensor([1, 3])
    p = project_signal(hermitise(draw(2, 6, 6)), count)
    assert torch.allclose(p @ p, p)
    assert torch.allclose(p, p.mH)
    assert torch.allclose(p.diagonal(dim1=-2, dim2=-1).sum(-1).real, count.double())


@pytest.mark.parametrize("count", [0, 1, 3, 6])
def test_projector_gradient_equals_autograd_where_that_is_finite(count):
    """On a generic spectrum the two gradients agree in complex128."""
    matrix, weight = draw(4, 6, 6), draw(4, 6, 6, seed=1)
    counts = torch.full((4,), count)
    mine = project_gradient(project_signal, matrix, counts, weight)
    naive = project_gradient(project_naively, matrix, counts, weight)
    assert torch.allclose(mine, naive, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_projector_gradient_equals_finite_differences(dtype):
    """Checked numerically, with a count of its own for each sample."""
    matrix = draw(2, 5, 5, dtype=dtype).requires_grad_()
    count = torch.tensor([1, 3])
    assert gradcheck(lambda x: project_signal(hermitise(x), count), (matrix,))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("loading", [0.0, 1e-4, 1e-2, 1.0])
def test_projector_gradient_is_finite_under_every_loading(loading, dtype):
    """A rank-deficient covariance, plain and loaded: finite, and the same whatever the load."""
    factors = draw(8, 144, 5, dtype=dtype) / 12
    eye = torch.eye(144, dtype=dtype)
    covariance = factors @ factors.mH
    count, weight = torch.full((8,), 5), draw(8, 144, 144, dtype=dtype, seed=1)
    mine = project_gradient(project_signal, covariance + loading * eye, count, weight)
    plain = project_gradient(project_signal, covariance, count, weight)
    assert mine.isfinite().all()
    assert torch.allclose(mine, plain, rtol=1e-3, atol=1e-3 * plain.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_naive_projector_gives_nan_on_a_loaded_covariance(dtype):
    """Bit-identical null eigenvalues are divided by their difference."""
    factors = draw(8, 144, 5, dtype=dtype) / 12
    loaded = factors @ factors.mH + torch.eye(144, dtype=dtype)
    weight = draw(8, 144, 144, dtype=dtype, seed=1)
    naive = project_gradient(project_naively, loaded, torch.full((8,), 5), weight)
    assert naive.isnan().any()


def test_projector_gradient_is_finite_without_a_gap():
    """Signal and noise that tie exactly meet the floor, not a division by zero."""
    for matrix in (torch.eye(4), torch.zeros(4, 4)):
        gradient = project_gradient(
            project_signal, matrix.double(), torch.tensor(2), draw(4, 4, dtype=torch.float64)
        )
        assert gradient.isfinite().all()
