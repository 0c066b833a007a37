"""Network of the incident: shapes, precision, the number of parameters."""

import pytest
import torch

from ris_model.config import PRESETS
from ris_model.data import draw_batch
from ris_model.network.incident import (
    Localiser,
    Prediction,
    describe_spectrum,
    join_parts,
    split_parts,
)

TINY = PRESETS["tiny"]


def predict(dtype: torch.dtype | None = None) -> Prediction:
    """A tiny prediction, under autocast when a dtype is given."""
    torch.manual_seed(0)
    batch = draw_batch(TINY.scenario, seed=0, split="train", index=0, size=3)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        return Localiser(TINY)(batch)


def count(module: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def test_full_size_is_that_of_the_case_report():
    """About 19.4M parameters: 8.3M backbone, 11M head, 9.5M of them in the unread maps."""
    with torch.device("meta"):
        model = Localiser(PRESETS["full"])
    assert count(model) == pytest.approx(19.36e6, rel=0.01)
    assert count(model.backbone) == pytest.approx(8.33e6, rel=0.01)
    assert count(model.head) == pytest.approx(11.03e6, rel=0.01)
    assert count(model.head.grid) == 9_544_365


def test_prediction_has_its_shapes():
    """Factors [B, N, K], slots [B, K, 3], maps and logits [B, K]."""
    prediction = predict()
    for name in ("factor_angle", "factor_range", "factors"):
        assert getattr(prediction, name).shape == (3, 16, 2)
    assert prediction.slots.shape == (3, 2, 3)
    for name in ("phi_soft", "theta_soft", "k_logits"):
        assert getattr(prediction, name).shape == (3, 2)
    assert (prediction.slots[..., 2] > 0).all()


def test_maps_stay_inside_the_field_of_view():
    """A soft-argmax is a mean over the grid."""
    prediction = predict()
    assert prediction.phi_soft.abs().max() <= TINY.scenario.azimuth_limit
    assert prediction.theta_soft.abs().max() <= TINY.scenario.elevation_limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_are_single_precision_under_autocast(dtype):
    """The body runs in half, the factors do not."""
    prediction = predict(dtype)
    assert prediction.slots.dtype == dtype
    assert prediction.factors.dtype == torch.complex64
    assert prediction.factors.isfinite().all()


def test_interleaved_parts_come_back():
    """Complex to interleaved real and back."""
    z = torch.randn(3, 4, dtype=torch.complex64)
    assert split_parts(z, torch.float32)[0, :2].tolist() == [z[0, 0].real, z[0, 0].imag]
    assert torch.equal(join_parts(split_parts(z, torch.float32)), z)


def test_spectrum_is_that_of_the_large_matrix():
    """The features start with the gaps of F F^H at trace 1, and MDL finds the strong sources."""
    torch.manual_seed(0)
    f = torch.randn(2, 16, 3, dtype=torch.complex128) * torch.tensor([1.0, 1.0, 1e-6])
    values = torch.linalg.eigvalsh(f @ f.mH).flip(-1)
    values = values / values.sum(-1, keepdim=True)
    features = describe_spectrum(f, elements=16)
    assert features.shape == (2, 17)
    assert torch.allclose(features[:, :2], (values[:, :3] - values[:, 1:4])[:, :2], atol=2e-6)
    assert features[:, 12:15].tolist() == [[0.0, 1.0, 0.0]] * 2


def test_spectrum_of_equal_factors_has_a_finite_gradient():
    """Repeated eigenvalues do no harm where only values are used."""
    f = torch.eye(6, 3, dtype=torch.complex64)[None].requires_grad_()
    describe_spectrum(f, elements=6).square().sum().backward()
    assert f.grad.isfinite().all()
