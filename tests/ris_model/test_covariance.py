"""Covariance: traces, ranks and the sample covariance."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ris_model.config import PRESETS, CovarianceForm
from ris_model.covariance import (
    choose_shrinkage,
    combine_factors,
    estimate_alternating,
    estimate_samples,
    form_blend,
    form_compact,
    form_effective,
    form_hybrid,
    form_hybrid_array,
    form_predicted,
    form_sources,
    load_diagonal,
    read_trace,
    retract,
    scale_trace,
    shrink,
)
from ris_model.data import draw_batch
from ris_model.training.schedule import plan_blend


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random complex numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.complex128, generator=generator)


FACTORS = draw(3, 16, 2)
R = form_predicted(FACTORS, trace=16.0)
SNR = torch.tensor([-5.0, 5.0, 20.0], dtype=torch.float64)
FORM = CovarianceForm()


def traces(r: torch.Tensor) -> torch.Tensor:
    """Traces as a vector."""
    return read_trace(r)[:, 0, 0]


@pytest.mark.parametrize("trace", [1.0, 16.0])
def test_predicted_covariance_has_its_trace_and_rank(trace):
    """F F^H scaled: Hermitian, the trace asked for, rank K."""
    r = form_predicted(FACTORS, trace=trace)
    assert torch.allclose(traces(r), torch.full((3,), trace, dtype=torch.float64))
    assert torch.linalg.matrix_rank(r, hermitian=True).tolist() == [2, 2, 2]
    assert torch.equal(r, r.mH)


def test_blend_and_effective_keep_trace_n():
    """Every covariance of the chain has trace N; the effective one has full rank."""
    blend = form_blend(R, form_predicted(draw(3, 16, 8, seed=1), trace=16.0), blend=0.3)
    effective = form_effective(blend, SNR, form=FORM)
    for r in (blend, effective):
        assert torch.allclose(traces(r), torch.full((3,), 16.0, dtype=torch.float64))
    assert torch.linalg.matrix_rank(blend, hermitian=True).tolist() == [10, 10, 10]
    assert torch.linalg.eigvalsh(effective).min() > 1e-3


def test_effective_equals_the_chain_step_by_step():
    """Load, scale back to trace N, shrink: one pass gives the same."""
    chain = shrink(scale_trace(load_diagonal(R, FORM.loading), 16.0), choose_shrinkage(SNR, FORM))
    assert torch.allclose(form_effective(R, SNR, form=FORM), chain)


def test_blend_gives_no_gradient_to_the_samples():
    """The sample covariance is data."""
    samples = R.clone().requires_grad_()
    leaf = R.clone().requires_grad_()
    form_blend(leaf, samples, blend=0.3).abs().square().sum().backward()
    assert samples.grad is None
    assert leaf.grad.isfinite().all()


def test_shrinkage_follows_the_snr_within_its_limits():
    """0.1 * 10^(-snr/20), clipped to [1e-4, 5e-2]."""
    assert choose_shrinkage(SNR, FORM).tolist() == pytest.approx([0.05, 0.05, 0.01])
    assert choose_shrinkage(torch.tensor([90.0]), FORM).item() == pytest.approx(1e-4)


def test_zero_matrix_scales_to_zero():
    """No division by a zero trace."""
    assert scale_trace(torch.zeros(1, 4, 4), 4.0).abs().max() == 0


def test_retraction_is_orthonormal_and_keeps_the_span():
    """Q^H Q = I and Q Q^H A = A."""
    q = retract(FACTORS)
    assert torch.allclose(q.mH @ q, torch.eye(2, dtype=q.dtype).expand(3, 2, 2))
    assert torch.allclose(q @ q.mH @ FACTORS, FACTORS)


def test_combined_factors_have_the_rank_of_the_slots():
    """Angle and range factors add up to rank K, not 2 K."""
    f = combine_factors(FACTORS, draw(3, 16, 2, seed=2), range_weight=0.3)
    assert torch.linalg.matrix_rank(f @ f.mH, hermitian=True).tolist() == [2, 2, 2]


def test_sample_covariance_equals_the_ridge_written_out():
    """One solve per scene equals a ridge solution per snapshot, outer products, mean kept."""
    y, h = draw(1, 8, 4), draw(1, 4, 16, seed=1)
    codes = torch.polar(torch.ones(1, 8, 16).double(), 6.3 * draw(1, 8, 16, seed=2).real)
    total = torch.zeros(16, 16, dtype=torch.complex128)
    for snapshot in range(8):
        phi = h[0] @ torch.diag(codes[0, snapshot])
        alpha = 1e-3 * (phi.mH @ phi).diagonal().sum().real / 16
        inverse = torch.linalg.inv(phi.mH @ phi + alpha * torch.eye(16))
        x = inverse @ phi.mH @ y[0, snapshot]
        total += torch.outer(x, x.conj())
    wanted = total * (16 / total.diagonal().sum().real)
    assert torch.allclose(estimate_samples(y, h, codes=codes)[0], wanted)


STEERING = draw(3, 2, 16, seed=3)
POWER = torch.tensor([[1.0, 2.0], [0.5, 0.0], [3.0, 1e-3]], dtype=torch.float64)
NOISE = torch.tensor([0.1, 0.0, 2.0], dtype=torch.float64)


def test_covariance_of_sources_equals_the_sum_written_out():
    """sum_k p_k a_k a_k^H + sigma^2 I at trace N."""
    for scene in range(3):
        total = NOISE[scene] * torch.eye(16, dtype=torch.complex128)
        for p, a in zip(POWER[scene], STEERING[scene], strict=True):
            total = total + p * torch.outer(a, a.conj())
        wanted = total * (16 / total.diagonal().sum().real)
        assert torch.allclose(form_sources(STEERING, POWER, NOISE)[scene], wanted)


def test_compact_matrix_has_the_largest_eigenvalues():
    """Those of the large matrix at trace 1, for columns of norm 1."""
    unit = STEERING / STEERING.norm(dim=-1, keepdim=True)
    large = torch.linalg.eigvalsh(form_sources(unit, POWER, NOISE) / 16)
    small = torch.linalg.eigvalsh(form_compact(unit, POWER, NOISE))
    assert torch.allclose(small, large[:, -3:], atol=1e-12)


@pytest.mark.parametrize("sources", [1, 2])
def test_alternating_least_squares_finds_the_subspace(draw_scenes, sources):
    """Nearer to the true span than ridge least squares is, without noise."""
    scenario = PRESETS["small"].scenario
    batch = draw_scenes(scenario, sources=sources, size=6, snr_min=60.0, snr_max=60.0)
    plain = batch.r_samp
    r = estimate_alternating(batch.y, batch.h, codes=batch.codes, sources=sources, rounds=40)
    assert torch.allclose(read_trace(r)[:, 0, 0], torch.tensor(36.0))
    values = torch.linalg.eigvalsh(r)
    assert (values[:, : -sources - 1].abs() < 1e-3).all()
    true = torch.linalg.eigh(batch.r_true).eigenvectors[..., -sources:]
    overlaps = []
    for found in (plain, r):
        top = torch.linalg.eigh(found).eigenvectors[..., -sources:]
        overlaps.append((true.mH @ top).abs().square().sum((-2, -1)).mean().item() / sources)
    assert overlaps[1] > overlaps[0]
    assert overlaps[1] > 0.8


@pytest.mark.parametrize("step", [0, 100, 250, 399])
def test_twins_agree_on_every_share_of_a_training(step):
    """Annealed from 0 and jittered: both take the share that the schedule gives."""
    training = PRESETS["small"].training
    form = replace(FORM, blend_jitter=0.05)
    share = plan_blend(form, training, step=step, seed=3)
    live = replace(form, blend=share)
    batch = draw_batch(PRESETS["tiny"].scenario, seed=2, split="train", index=0, size=6)
    hybrid = form_hybrid(batch.r_true, batch.r_samp, batch.snr_db, form=live)
    arrays = (batch.r_true.numpy(), batch.r_samp.numpy(), batch.snr_db.numpy())
    assert np.abs(hybrid.numpy() - form_hybrid_array(*arrays, form=live)).max() < 1e-4
    alone = form_hybrid_array(*arrays, form=replace(form, blend=0.0))
    moved = np.abs(hybrid.numpy() - alone).max()
    assert moved == pytest.approx(0.0, abs=1e-4) if share == 0 else moved > 1e-2 * share


def test_twins_agree():
    """Torch and numpy, FP32 against FP64, at every SNR; any scale of either matrix."""
    batch = draw_batch(PRESETS["tiny"].scenario, seed=2, split="train", index=0, size=6)
    snr = torch.tensor([-40.0, -5.0, 0.0, 5.0, 20.0, 80.0])
    skew = 0.1j * torch.ones_like(batch.r_true)
    hybrid = form_hybrid(0.2 * batch.r_true + skew, 3 * batch.r_samp, snr, form=FORM)
    arrays = ((0.2 * batch.r_true + skew).numpy(), 3 * batch.r_samp.numpy(), snr.numpy())
    twin = form_hybrid_array(*arrays, form=FORM)
    assert np.abs(hybrid.numpy() - twin).max() < 1e-4
    assert np.allclose(np.trace(twin, axis1=-2, axis2=-1), 16.0)
    assert np.linalg.eigvalsh(twin).min() > 0
