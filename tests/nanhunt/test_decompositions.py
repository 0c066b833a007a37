"""Decompositions whose gradient never divides by a tie, beside autograd and finite differences."""

import re
from pathlib import Path

import pytest
import torch

from nanhunt.trials.decompositions import detached, eigh_by_svd, gap_only, loaded, split

REAL, COMPLEX = torch.float64, torch.complex128


def draw(*shape, dtype=REAL, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def projector_loss(vectors, weight):
    """A function of the subspace of the first two vectors alone."""
    part = vectors[..., :2]
    return ((part @ part.mH) * weight).sum().real


def gradient(function, matrix):
    held = matrix.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(held), held)
    return found


def hermitian(a):
    return (a + a.mH) / 2


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("shape", [(4, 4), (3, 4, 4)])
def test_eigh_agrees_with_autograd(dtype, shape):
    """Without a tie it is the gradient of autograd, of values and of vectors."""
    matrix, weight = hermitian(draw(*shape, dtype=dtype)), draw(*shape, dtype=dtype, seed=1)

    def loss(returned):
        values, vectors = returned
        return projector_loss(vectors, weight) + values.pow(3).sum()

    def ours(a):
        return loss(gap_only(a, torch.linalg.eigh(a.detach())))

    expected = gradient(lambda a: loss(torch.linalg.eigh(a)), matrix)
    # Both are gradients in the space of Hermitian matrices, whatever the other part is.
    torch.testing.assert_close(gradient(ours, matrix), hermitian(expected))


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 5), (2, 4, 3)])
def test_svd_agrees_with_autograd(dtype, shape):
    """Without a tie it is the gradient of autograd, square and not, real and complex."""
    matrix = draw(*shape, dtype=dtype)
    low = min(shape[-2:])
    weight = draw(*shape, dtype=dtype, seed=1)

    def loss(returned):
        u, s, vh = returned
        inside = u[..., :, :2] @ vh[..., :2, :]
        return (inside * weight).sum().real + s[..., :low].pow(3).sum()

    def theirs(a):
        return loss(torch.linalg.svd(a, full_matrices=False))

    def ours(a):
        return loss(gap_only(a, torch.linalg.svd(a.detach(), full_matrices=False)))

    torch.testing.assert_close(gradient(ours, matrix), gradient(theirs, matrix))


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("count", [2, 3])
def test_exact_ties_are_finite_and_right(dtype, count):
    """A projector on a whole group of ties has a gradient, and autograd has NaN."""
    weight = hermitian(draw(4, 4, dtype=dtype, seed=1))
    values = torch.tensor([1.0] * count + [2.0, 3.0, 5.0][: 4 - count], dtype=REAL)
    matrix = torch.diag(values).to(dtype)

    def loss(vectors):
        part = vectors[..., :count]
        return ((part @ part.mH) * weight).sum().real

    naive = gradient(lambda a: loss(torch.linalg.eigh(a)[1]), matrix)
    assert not bool(torch.isfinite(naive).all())
    ours = gradient(lambda a: loss(gap_only(a, torch.linalg.eigh(a.detach()))[1]), matrix)
    assert bool(torch.isfinite(ours).all())
    step = hermitian(draw(4, 4, dtype=dtype, seed=2))
    ends = (loss(torch.linalg.eigh(matrix + h * step)[1]) for h in (1e-6, -1e-6))
    slope = (next(ends) - next(ends)) / 2e-6
    torch.testing.assert_close((ours.conj() * step).sum().real, slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_svd_of_a_singular_matrix_with_ties(dtype):
    """Equal and vanishing singular values leave nothing that is not finite."""
    matrix = torch.zeros(4, 3, dtype=dtype)
    matrix[0, 0] = matrix[1, 1] = 1.0

    def loss(returned):
        u, s, vh = returned
        part = u[..., :2] @ vh[..., :2, :]
        return part.abs().square().sum() + s.sum()

    ours = gradient(lambda a: loss(gap_only(a, torch.linalg.svd(a, full_matrices=False))), matrix)
    assert bool(torch.isfinite(ours).all())
    assert float(ours.abs().max()) > 0


def test_detached_lets_the_values_through():
    """The gradient of the values alone is left."""
    matrix = hermitian(draw(4, 4))
    values, vectors = detached(torch.linalg.eigh(matrix.requires_grad_()))
    assert values.requires_grad
    assert not vectors.requires_grad


def test_other_beliefs():
    """More loading moves every value by as much; svd gives a positive matrix's own values."""
    root = draw(4, 4)
    matrix = root @ root.mT
    before = torch.linalg.eigvalsh(matrix)
    after = torch.linalg.eigvalsh(loaded(matrix, 0.5))
    torch.testing.assert_close(after - before, (0.5 * matrix.trace() / 4).expand(4))
    values, vectors = eigh_by_svd(matrix)
    torch.testing.assert_close(values, before)
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.mT, matrix)


@pytest.mark.parametrize("shape", [(4, 4), (5, 3)])
def test_split(shape):
    """Ties are split by far less than what is compared, and differently by another seed."""
    matrix = torch.eye(*shape, dtype=REAL)
    one, other = split(matrix, 0), split(matrix, 1)
    assert float((one - matrix).abs().max()) < 1e-7
    assert not torch.equal(one, other)
    assert torch.equal(one, split(matrix, 0))
    gaps = torch.linalg.svdvals(one).diff().abs()
    assert float(gaps.min()) > 0
    if shape[0] == shape[1]:
        assert torch.equal(one, one.mH)


def test_the_page_runs(capsys):
    """The example of docs/trials.md proves what it says, and its cure is finite."""
    page = Path(__file__).parents[2] / "docs" / "trials.md"
    [code] = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, str(page), "exec"), {"__name__": "page"})  # noqa: S102 - our own page
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("gap_only_projector True") for line in lines)
    assert any(line.startswith("more_loading False") for line in lines)
    assert "nan" not in lines[-1]
