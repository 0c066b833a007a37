"""Eigenvectors and singular vectors whose gradient never divides by a tie.

A loss that depends on a subspace alone does not depend on which vectors of it are returned. The
parts of the gradient inside of a group of equal values are then 0 in exact arithmetic, and autograd
computes 0/0 for them. Here they are 0, and only the gaps between groups divide: M. Ionescu,
O. Vantzos, C. Sminchisescu, Matrix Backpropagation for Deep Networks with Structured Layers, ICCV
2015, eqs. 14 and 20 with the pairs of one group left out.
"""

from typing import Any

import torch
from torch import Tensor

# Relative to the largest value: closer ones cannot be told apart by an n x n decomposition.
_ROUNDING = 8.0
_SPLIT = 1e-9  # relative size of what splits ties in FP64


def gap_only(matrix: Tensor, returned: Any) -> tuple[Tensor, ...]:
    """Give what `eigh` or `svd` returned of a matrix a gradient without the ties.

    Args:
        matrix: [..., m, n], real or complex.
        returned: (values [..., n], vectors [..., n, n]) of `eigh`, or (U, S, Vh) of `svd`.
    """
    function: Any = _Eigh if len(returned) == 2 else _Svd
    values: tuple[Tensor, ...] = function.apply(matrix, *(t.detach() for t in returned))
    return values


def detached(returned: Any) -> tuple[Tensor, ...]:
    """Let the gradient pass through the values alone, and not through the vectors."""
    least = min(t.dim() for t in returned)
    return tuple(t if t.dim() == least else t.detach() for t in returned)


def loaded(matrix: Tensor, load: float) -> Tensor:
    """More diagonal loading, relative to the mean of the diagonal."""
    size = matrix.shape[-1]
    mean = matrix.diagonal(dim1=-2, dim2=-1).real.mean(-1)[..., None, None]
    eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    return matrix + load * mean.detach() * eye


def eigh_by_svd(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Values and vectors of a positive matrix from its `svd`, in the order of `eigh`."""
    vectors, values, _ = torch.linalg.svd(matrix)
    return values.flip(-1), vectors.flip(-1)


def split(matrix: Tensor, seed: int) -> Tensor:
    """Add Hermitian noise, far below the values, so that no two of them tie; for FP64."""
    generator = torch.Generator(device=matrix.device).manual_seed(seed)
    shape, real = matrix.shape, matrix.real.dtype
    noise = torch.randn(shape, generator=generator, dtype=real, device=matrix.device)
    noise = noise.to(matrix.dtype)
    scale = matrix.detach().abs().amax((-2, -1), keepdim=True)
    is_square = shape[-1] == shape[-2]
    return matrix + _SPLIT * scale * (noise + noise.mH if is_square else noise)


def _inverse_gaps(values: Tensor, gaps: Tensor) -> Tensor:
    """1 / gap, and 0 where two values cannot be told apart."""
    size = values.shape[-1]
    largest = values.abs().amax(-1, keepdim=True)[..., None]
    tie = _ROUNDING * torch.finfo(values.dtype).eps * size * largest
    is_tied = (values[..., None] - values[..., None, :]).abs() <= tie
    return torch.where(is_tied, 0.0, 1.0 / torch.where(is_tied, 1.0, gaps))


class _Eigh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _matrix: Tensor, values: Tensor, vectors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(values, vectors)
        return values.clone(), vectors.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        values, vectors = ctx.saved_tensors
        of_values, of_vectors = gradients
        inside = vectors.mH @ of_vectors
        inside = inside * _inverse_gaps(values, values[..., None, :] - values[..., None])
        inside = inside + torch.diag_embed(of_values).to(inside.dtype)
        result = vectors @ inside @ vectors.mH
        return (result + result.mH) / 2, None, None  # only Hermitian changes of the matrix count


class _Svd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, _matrix: Tensor, left: Tensor, values: Tensor, right: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(left, values, right)
        return left.clone(), values.clone(), right.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        count = ctx.saved_tensors[1].shape[-1]
        left, values, right = ctx.saved_tensors
        left, right = left[..., :count], right[..., :count, :]
        of_left, of_values, of_right = gradients
        of_left, of_right = of_left[..., :count], of_right[..., :count, :]
        squares = values.square()
        inverse = _inverse_gaps(values, squares[..., None, :] - squares[..., None])
        a, b = left.mH @ of_left, right @ of_right.mH
        inside = (a - a.mH) * inverse * values[..., None, :]
        inside = inside + values[..., None] * (b - b.mH) * inverse
        inside = inside + torch.diag_embed(of_values).to(inside.dtype)
        largest = values.amax(-1, keepdim=True)
        is_null = values <= _ROUNDING * torch.finfo(values.dtype).eps * count * largest
        inverted = torch.where(is_null, 0.0, 1.0 / torch.where(is_null, 1.0, values))
        if left.is_complex():  # the phase of a pair of vectors, which one side alone may turn
            phase = (a - a.mH).diagonal(dim1=-2, dim2=-1) / 2
            inside = inside + torch.diag_embed(phase * inverted)
        result = left @ inside @ right
        # What leaves the subspaces, where the matrix is not square.
        outer = (of_left - left @ a) * inverted[..., None, :]
        other = inverted[..., None] * (of_right - b.mH @ right)
        return result + outer @ right + left @ other, None, None, None
