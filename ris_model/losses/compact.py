"""Compact: covariances that are a few columns and a multiple of the identity, without N x N.

R = Q M Q^H + c (I - Q Q^H), Q an orthonormal basis of all columns that occur: those of the
predicted sources, of the samples and of the true sources. Squared norms, projectors on leading
eigenvectors and their gradients are those of M; what lies outside Q is c, N - m times.

The basis has no gradient. A change of a column out of the span of Q changes an energy or an angle
to second order only, because R has no entries between Q and what is outside it.

Shapes: B scenes, N elements, K source slots, m columns of the basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ris_model.linalg import hermitise

# Keeps the scaling finite where there is neither power nor noise.
_LEAST_TRACE = 1e-12


@dataclass(frozen=True, slots=True)
class Compact:
    """A Hermitian matrix of side N that is a multiple of the identity outside a basis."""

    inside: torch.Tensor  # [B, m, m] M
    outside: torch.Tensor  # [B] c
    side: int  # N

    def measure_energy(self) -> torch.Tensor:
        """Squared Frobenius norm, [B]."""
        inside = torch.view_as_real(self.inside.resolve_conj()).square().sum((-3, -2, -1))
        return inside + self._rest * self.outside.square()

    def subtract(self, other: Compact) -> Compact:
        """Return the difference of two on one basis."""
        return Compact(self.inside - other.inside, self.outside - other.outside, self.side)

    def blend(self, other: Compact, share: float) -> Compact:
        """(1 - share) of this one and `share` of another, on one basis."""
        return Compact(
            (1 - share) * self.inside + share * other.inside,
            (1 - share) * self.outside + share * other.outside,
            self.side,
        )

    def shrink(self, amount: torch.Tensor) -> Compact:
        """(1 - a) R + a I for R at trace N and a [B]."""
        eye = torch.eye(self.inside.shape[-1], dtype=self.inside.dtype, device=amount.device)
        kept = 1 - amount
        inside = kept[:, None, None] * self.inside + amount[:, None, None] * eye
        return Compact(inside, kept * self.outside + amount, self.side)

    def suppress(self, span: torch.Tensor, dual: torch.Tensor) -> Compact:
        """P R P with P = I - span dual, span [B, m, K] in coordinates of the basis."""
        # two updates of rank K instead of two products of side m
        left = self.inside - span @ (dual @ self.inside)
        return Compact(left - (left @ span) @ dual, self.outside, self.side)

    def expand(self, basis: torch.Tensor) -> torch.Tensor:
        """Return the [B, N, N] matrix."""
        eye = torch.eye(self.side, dtype=basis.dtype, device=basis.device)
        outside = self.outside[:, None, None]
        inner = self.inside - outside * torch.eye(
            basis.shape[-1], dtype=basis.dtype, device=basis.device
        )
        return basis @ inner @ basis.mH + outside * eye

    @property
    def _rest(self) -> int:
        """N - m."""
        return self.side - self.inside.shape[-1]


def lay_basis(columns: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return an orthonormal basis [B, N, m] whose span has all of [B, N, *] columns.

    By Householder reflections, which need no full rank: empty or equal columns only make the
    basis larger than it had to be. Without gradient.
    """
    with torch.no_grad():
        stacked = torch.cat([part.detach() for part in columns], dim=-1)
        basis: torch.Tensor = torch.linalg.qr(stacked).Q
        return basis


def form_compact_sources(
    coordinates: torch.Tensor,
    power: torch.Tensor,
    *,
    side: int,
    noise: torch.Tensor | None = None,
) -> Compact:
    """R = sum_k p_k a_k a_k^H + sigma^2 I at trace N, for a_k of norm 1.

    Args:
        coordinates: [B, m, K], Q^H a_k.
        power: [B, K] p_k, 0 in empty slots.
        side: N.
        noise: [B] sigma^2, none when left out.
    """
    floor = torch.zeros_like(power[:, 0]) if noise is None else noise
    scale = side / (power.sum(-1) + side * floor).clamp_min(_LEAST_TRACE)
    inside = hermitise((coordinates * power[:, None]) @ coordinates.mH)
    eye = torch.eye(inside.shape[-1], dtype=inside.dtype, device=inside.device)
    inside = scale[:, None, None] * (inside + floor[:, None, None] * eye)
    return Compact(inside, scale * floor, side)


def form_compact_samples(coordinates: torch.Tensor, *, side: int) -> Compact:
    """R = sum_l x_l x_l^H for Q^H x_l [B, m, L] whose energies add up to N."""
    inside = hermitise(coordinates @ coordinates.mH)
    return Compact(inside, torch.zeros_like(inside[:, 0, 0].real), side)
