"""Linalg: the few operations with a defined gradient, and the one precision decision.

Shapes: N matrix side, `...` any leading dimensions.
"""

from __future__ import annotations

from typing import Any, cast

import torch


def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """Raise a half-precision tensor to FP32 / complex64; leave everything else as it came.

    The only place that decides the precision of the loss: FP64 stays FP64, so that a replay in
    double precision is one throughout. Integers and masks pass unchanged.
    """
    if tensor.is_complex():
        return tensor.to(torch.promote_types(tensor.dtype, torch.complex64))
    if tensor.is_floating_point():
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return tensor


def hermitise(matrix: torch.Tensor) -> torch.Tensor:
    """Return the Hermitian part (X + X^H) / 2 of [..., N, N].

    Where the naive one fails: `eigh(X)` reads one triangle only, so an error in the other goes
    unseen and the gradient of its entries does not match finite differences.
    """
    return (matrix + matrix.mH) / 2


def factorise(matrix: torch.Tensor) -> torch.Tensor:
    """Cholesky factor of [..., N, N]; NaN where there is none.

    Where the naive one fails: `torch.linalg.cholesky` raises for the whole batch when one matrix
    in it is not finite, so a training that could have skipped the batch ends instead.
    """
    lower, failed = torch.linalg.cholesky_ex(matrix)
    checked: torch.Tensor = lower.masked_fill((failed != 0)[..., None, None], torch.nan)
    return checked


def sqrt_or_zero(x: torch.Tensor) -> torch.Tensor:
    """Square root of a non-negative real tensor with gradient 0 at 0.

    Where the naive one fails: `x.sqrt()` has the gradient 1/(2 sqrt(0)) = inf at 0, which the
    next product with 0 turns into NaN; masking its *output* by `where` does not help.
    """
    positive = x > 0
    # the inner where keeps the root away from 0, the outer one puts the value back
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def norm_or_zero(x: torch.Tensor, dim: int | tuple[int, ...] = -1) -> torch.Tensor:
    """Euclidean norm sqrt(sum |x|^2) over `dim`, real, with gradient 0 at x = 0.

    Where the naive one fails: `(x.abs()**2).sum(dim).sqrt()` has the gradient inf * 0 = NaN at
    an all-zero vector, for instance at a padded slot or an exact match.
    """
    energy = (x * x.conj()).real if x.is_complex() else x.square()
    return sqrt_or_zero(energy.sum(dim))


def project_signal(
    matrix: torch.Tensor,
    count: torch.Tensor,
    *,
    gap_floor: float = 1e-6,
) -> torch.Tensor:
    """Projector on the top eigenvectors, P = sum_{i in S} v_i v_i^H, differentiable by its gap.

    Backward: V (M o F) V^H with M = V^H sym(G) V and F_ij = 1 / max(|l_i - l_j|, floor) for a
    signal i and a noise j (and the reverse), 0 inside a block. P does not change when vectors
    turn within the signal or within the noise block, so those differences have no part in it.

    Where the naive one fails: autograd through `eigh` divides by *all* eigenvalue differences.
    Two bit-identical noise eigenvalues, as every loaded rank-deficient covariance has, give
    0/0 = NaN there. It equals this one wherever it is finite.

    Args:
        matrix: [..., N, N] Hermitian, real or complex.
        count: [...] integer, size of the signal block of each matrix, 0..N.
        gap_floor: smallest difference that is divided by, as a share of the largest |l|.

    Returns:
        [..., N, N] of the dtype of `matrix`. Differentiable once.
    """
    return cast("torch.Tensor", _SignalProjector.apply(matrix, count, gap_floor))  # type: ignore[no-untyped-call]


class _SignalProjector(torch.autograd.Function):
    """The projector of `project_signal`; see there for the equations."""

    @staticmethod
    def forward(
        ctx: Any,
        matrix: torch.Tensor,
        count: torch.Tensor,
        gap_floor: float,
    ) -> torch.Tensor:
        """Return P and keep V and F."""
        values, vectors = torch.linalg.eigh(matrix)
        side = values.shape[-1]
        # eigh sorts upwards: the signal block is at the end
        signal = torch.arange(side, device=matrix.device) >= side - count[..., None]
        across = signal[..., :, None] != signal[..., None, :]
        gap = (values[..., :, None] - values[..., None, :]).abs()
        scale = values.abs().amax(-1)[..., None, None]
        floor = (gap_floor * scale).clamp_min(torch.finfo(values.dtype).tiny)
        weight = torch.where(across, 1 / torch.maximum(gap, floor), 0.0)
        ctx.save_for_backward(vectors, weight)
        top = vectors * signal[..., None, :]
        projector: torch.Tensor = top @ vectors.mH
        return projector

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Return V (M o F) V^H."""
        vectors, weight = ctx.saved_tensors
        inner = vectors.mH @ hermitise(grads[0]) @ vectors
        return vectors @ (inner * weight) @ vectors.mH, None, None
