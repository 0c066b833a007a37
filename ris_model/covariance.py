"""Covariance: from snapshots and from predicted factors; trace, loading, shrinkage, blending.

Shapes: B scenes, L snapshots, M antennas, N elements, K source slots.
"""

from __future__ import annotations

import numpy as np
import torch

from ris_model.config import CovarianceForm
from ris_model.linalg import hermitise, sqrt_or_zero

# Keeps the scaling finite at an all-zero matrix; every real trace is far above it.
_LEAST_TRACE = 1e-12
# Ridge of the alternating least squares, over the mean of the diagonal.
_RIDGE = 1e-2


def read_trace(r: torch.Tensor) -> torch.Tensor:
    """Real part of the trace of [..., N, N], as [..., 1, 1]."""
    trace = r.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (trace.real if r.is_complex() else trace)[..., None, None]


def scale_trace(r: torch.Tensor, trace: float) -> torch.Tensor:
    """Scale [..., N, N] to the given trace."""
    return r * (trace / read_trace(r).clamp_min(_LEAST_TRACE))


def load_diagonal(r: torch.Tensor, loading: float) -> torch.Tensor:
    """R + loading * I."""
    eye = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    return r + loading * eye


def estimate_samples(
    y: torch.Tensor,
    h: torch.Tensor,
    *,
    codes: torch.Tensor,
    ridge: float = 1e-3,
) -> torch.Tensor:
    """Sample covariance R_samp = (1/L) sum_l x_l x_l^H of ridge least squares, at trace N.

    The snapshot mean is not subtracted: it belongs to the signal. The rank is at most L.

    Args:
        y: [B, L, M] snapshots.
        h: [B, M, N] channel.
        codes: [B, L, N] unit-modulus codes.
        ridge: relative regularisation.

    Returns:
        [B, N, N] complex of the precision of `y`.
    """
    x_BLN = invert_snapshots(y, h, codes=codes, ridge=ridge)
    return scale_trace(hermitise(x_BLN.mT @ x_BLN.conj()), h.shape[-1])


def invert_snapshots(
    y: torch.Tensor,
    h: torch.Tensor,
    *,
    codes: torch.Tensor,
    ridge: float = 1e-3,
) -> torch.Tensor:
    """Surface fields by ridge least squares, one per snapshot, [B, L, N].

    x_l = Phi_l^H (Phi_l Phi_l^H + alpha I)^-1 y_l,  Phi_l = H diag(c_l),
    alpha = ridge * tr(Phi^H Phi) / N

    |c_n| = 1, so Phi_l Phi_l^H = H H^H for every l: one solve per scene.
    """
    gram_BMM = hermitise(h @ h.mH)
    alpha = ridge * read_trace(gram_BMM) / h.shape[-1]
    eye = torch.eye(h.shape[-2], dtype=h.dtype, device=h.device)
    z_BML = torch.linalg.solve(gram_BMM + alpha * eye, y.mT)
    x_BLN: torch.Tensor = codes.conj() * (h.mH @ z_BML).mT
    return x_BLN


def estimate_alternating(
    y: torch.Tensor,
    h: torch.Tensor,
    *,
    codes: torch.Tensor,
    sources: int,
    rounds: int = 10,
) -> torch.Tensor:
    """Sample covariance F (sum_l s_l s_l^H / L) F^H of rank K by alternating least squares.

    y_l ~ H diag(c_l) F s_l; s_l given F, then F given all s_l, each with a ridge. F is free: no
    steering vectors. K (N + L - K) unknowns have L M equations, so K = 1 is determined with 16
    snapshots of 8 antennas and 36 elements, and K = 2 is too, just; 144 elements need more.

    Args:
        y: [B, L, M] snapshots.
        h: [B, M, N] channel.
        codes: [B, L, N] unit-modulus codes.
        sources: K, the rank.
        rounds: of the alternation.

    Returns:
        [B, N, N] complex at trace N.
    """
    side = h.shape[-1]
    phi_BLMN = h[:, None] * codes[:, :, None]
    stacked = phi_BLMN.flatten(1, 2)
    cross_BLMLM = (stacked @ stacked.mH).unflatten(-1, y.shape[1:]).unflatten(1, y.shape[1:])
    _, vectors = torch.linalg.eigh(estimate_samples(y, h, codes=codes))
    f_BNK = vectors[..., -sources:]
    for _ in range(rounds):
        g_BLMK = phi_BLMN @ f_BNK[:, None]
        gram = hermitise(g_BLMK.mH @ g_BLMK)
        s_BLK = torch.linalg.solve(_ridge(gram), g_BLMK.mH @ y[..., None])[..., 0]
        weight = (s_BLK @ s_BLK.mH)[:, :, None, :, None]
        kernel = (cross_BLMLM * weight).flatten(3, 4).flatten(1, 2)
        z = torch.linalg.solve(_ridge(hermitise(kernel)), y.flatten(1)[..., None])
        z_BLM = z[..., 0].unflatten(-1, y.shape[1:])
        back_BLN = (phi_BLMN.mH @ z_BLM[..., None])[..., 0]
        f_BNK = back_BLN.mT @ s_BLK.conj()
    return scale_trace(hermitise(f_BNK @ (s_BLK.mT @ s_BLK.conj()) @ f_BNK.mH), side)


def _ridge(gram: torch.Tensor) -> torch.Tensor:
    """Load a Gram matrix by a share of the mean of its diagonal."""
    side = gram.shape[-1]
    eye = torch.eye(side, dtype=gram.dtype, device=gram.device)
    return gram + (_RIDGE * read_trace(gram) / side).clamp_min(_LEAST_TRACE) * eye


def retract(factors: torch.Tensor) -> torch.Tensor:
    """QR retraction: the orthonormal basis Q of [B, N, K] factors.

    Needs columns of full rank: QR has no finite gradient at a zero column.
    """
    basis: torch.Tensor = torch.linalg.qr(factors).Q
    return basis


def combine_factors(
    angle: torch.Tensor,
    ranges: torch.Tensor,
    *,
    range_weight: float,
) -> torch.Tensor:
    """F = Q(angle) + w * ranges, [B, N, K]; F F^H has rank K at most."""
    return retract(angle) + range_weight * ranges


def form_predicted(factors: torch.Tensor, *, trace: float) -> torch.Tensor:
    """R = F F^H at the given trace, [B, N, N] from F [B, N, K]."""
    return scale_trace(hermitise(factors @ factors.mH), trace)


def form_sources(
    steering: torch.Tensor,
    power: torch.Tensor,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """R = sum_k p_k a_k a_k^H + sigma^2 I at trace N.

    Args:
        steering: [B, K, N], the columns of A as rows.
        power: [B, K] p_k, 0 in the empty slots.
        noise: [B] sigma^2, none when left out.

    Returns:
        [B, N, N] complex.
    """
    weighted = steering * power[..., None]
    r = hermitise(weighted.mT @ steering.conj())
    side = steering.shape[-1]
    if noise is not None:
        eye = torch.eye(side, dtype=r.dtype, device=r.device)
        r = r + noise[:, None, None] * eye
    return scale_trace(r, side)


def form_compact(
    steering: torch.Tensor,
    power: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """Return the small matrix with the K + 1 largest eigenvalues of `form_sources` at trace 1.

    B^H B + sigma^2 I with B the columns sqrt(p_k) a_k, and one sigma^2 more: the N - K others are
    all sigma^2. Its gradient needs neither the N x N matrix nor its null space.

    Returns:
        [B, K + 1, K + 1] complex.
    """
    side, slots = steering.shape[-1], steering.shape[-2]
    columns = steering * sqrt_or_zero(power)[..., None]
    gram = hermitise(columns.conj() @ columns.mT)
    padded = torch.nn.functional.pad(gram, (0, 1, 0, 1))
    eye = torch.eye(slots + 1, dtype=gram.dtype, device=gram.device)
    trace = power.sum(-1) + side * noise
    return (padded + noise[:, None, None] * eye) / trace.clamp_min(_LEAST_TRACE)[:, None, None]


def form_blend(r: torch.Tensor, r_samp: torch.Tensor, *, blend: float) -> torch.Tensor:
    """R_blend = (1 - beta) R + beta R_samp at trace N, from R at trace N.

    The gradient goes to R alone, R_samp is data.
    """
    samples = scale_trace(r_samp.detach(), r.shape[-1])
    return (1 - blend) * r + blend * samples


def choose_shrinkage(snr_db: torch.Tensor, form: CovarianceForm) -> torch.Tensor:
    """Shrinkage a = base * 10^(-snr/20), clipped; [B] from dB."""
    return (form.shrink_base * 10.0 ** (-snr_db / 20.0)).clamp(form.shrink_min, form.shrink_max)


def choose_loading(snr_db: torch.Tensor, form: CovarianceForm) -> torch.Tensor:
    """Shrinkage of an effective covariance, [B] from dB: that of the SNR and the loading as one.

    Adding e I at trace N and scaling back is a shrinkage by e / (1 + e), and two shrinkages a, b
    are one, a + b - a b.
    """
    load = form.loading / (1 + form.loading)
    amount = choose_shrinkage(snr_db, form)
    return amount + load - amount * load


def shrink(r: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """(1 - a) R + a (tr R / N) I for [B, N, N] and a [B]; keeps the trace."""
    a = amount[:, None, None]
    eye = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    return (1 - a) * r + (a * read_trace(r) / r.shape[-1]) * eye


def form_effective(
    r: torch.Tensor,
    snr_db: torch.Tensor,
    *,
    form: CovarianceForm,
) -> torch.Tensor:
    """Effective covariance (1 - a) (R + eps I) N / tr(R + eps I) + a I, at trace N.

    Loading and shrinkage in one pass over the matrix, see `choose_loading`.

    Args:
        r: [B, N, N] Hermitian, at trace N.
        snr_db: [B] dB.
        form: loading eps and the law of the shrinkage a.

    Returns:
        [B, N, N], full rank.
    """
    return shrink(r, choose_loading(snr_db, form))


def form_hybrid(
    r: torch.Tensor,
    r_samp: torch.Tensor,
    snr_db: torch.Tensor,
    *,
    form: CovarianceForm,
) -> torch.Tensor:
    """Hermitise, scale to trace N, blend with the samples, load and shrink: all in one.

    What the losses do step by step, for an R of any scale; `form_hybrid_array` is its twin.

    Args:
        r: [B, N, N] at any positive trace.
        r_samp: [B, N, N] sample covariance, at any positive trace.
        snr_db: [B] dB.
        form: share of the samples, loading, law of the shrinkage.

    Returns:
        [B, N, N] at trace N, full rank.
    """
    scaled = scale_trace(hermitise(r), r.shape[-1])
    blended = hermitise(form_blend(scaled, hermitise(r_samp), blend=form.blend))
    return form_effective(blended, snr_db, form=form)


def form_hybrid_array(
    r: np.ndarray,
    r_samp: np.ndarray,
    snr_db: np.ndarray,
    *,
    form: CovarianceForm,
) -> np.ndarray:
    """Form the same in numpy, in double precision, each step by itself; see `form_hybrid`."""
    side = r.shape[-1]
    eye = np.eye(side)

    def scale(x: np.ndarray) -> np.ndarray:
        x = (x + np.swapaxes(x.conj(), -1, -2)) / 2
        trace = np.trace(x, axis1=-2, axis2=-1).real[..., None, None]
        return np.asarray(side * x / np.maximum(trace, _LEAST_TRACE))

    blended = scale((1 - form.blend) * scale(r) + form.blend * scale(r_samp))
    loaded = scale(blended + form.loading * eye)
    amount = form.shrink_base * 10.0 ** (-np.asarray(snr_db, dtype=np.float64) / 20.0)
    a = np.clip(amount, form.shrink_min, form.shrink_max)[..., None, None]
    return np.asarray((1 - a) * loaded + a * eye)
