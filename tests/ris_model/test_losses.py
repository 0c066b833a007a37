"""Losses of the incident: each term against finite differences and the inputs that are awkward."""

from dataclasses import fields, replace

import pytest
import torch
from torch.autograd import gradcheck

from ris_model.config import PRESETS, CovarianceForm, LossWeights
from ris_model.data import Batch, draw_batch
from ris_model.geometry import place_elements, steer
from ris_model.losses import (
    INCIDENT_TERMS,
    SOUND_TERMS,
    Objective,
    match_slots,
    pick_slots,
    prepare_prediction,
    wrap_angle,
)
from ris_model.network import Prediction

# without the load the null eigenvalues differ by rounding, and align has a gradient to check
CONFIG = replace(PRESETS["tiny"], covariance=CovarianceForm(align_loading=0.0))
LEAVES = ("factor_angle", "factor_range", "factors", "slots", "k_logits")


def make_batch(dtype: torch.dtype = torch.float64) -> Batch:
    """Three scenes, two of one source, in double precision."""
    batch = draw_batch(CONFIG.scenario, seed=1, split="train", index=0, size=3)
    kinds = {torch.float32: dtype, torch.complex64: torch.complex128}
    if dtype == torch.float32:
        kinds = {}
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return Batch(**{name: t.to(kinds.get(t.dtype, t.dtype)) for name, t in tensors.items()})


BATCH = make_batch()


def make_leaves() -> tuple[torch.Tensor, ...]:
    """Generic predictions; the two eigenvalues of R_hat lie .01 apart."""
    torch.manual_seed(2)
    angle, ranges, basis = torch.randn(3, 3, 16, 2, dtype=torch.complex128) / 4
    factors = torch.linalg.qr(basis).Q * torch.tensor([1.0, 0.99])
    slots = torch.rand(3, 2, 3, dtype=torch.float64) + torch.tensor([-0.5, -0.5, 0.5])
    logits = torch.randn(3, 2, dtype=torch.float64)
    return tuple(t.requires_grad_() for t in (angle, ranges, factors, slots, logits))


def predict(*leaves: torch.Tensor) -> Prediction:
    """A prediction of those tensors."""
    still = torch.zeros(3, 2, dtype=torch.float64)
    return Prediction(**dict(zip(LEAVES, leaves, strict=True)), phi_soft=still, theta_soft=still)


def evaluate(name: str, *leaves: torch.Tensor) -> torch.Tensor:
    """One unweighted term."""
    return INCIDENT_TERMS[name](CONFIG)(prepare_prediction(predict(*leaves), BATCH, CONFIG))


def read_gradients(name: str, leaves: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """The gradients that exist."""
    value = evaluate(name, *leaves)
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    return [grad for grad in grads if grad is not None]


@pytest.mark.parametrize("name", INCIDENT_TERMS)
def test_gradient_equals_finite_differences(name):
    """Every term on generic inputs."""
    run = lambda *leaves: evaluate(name, *leaves)
    assert gradcheck(run, make_leaves(), fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("name", INCIDENT_TERMS)
def test_term_is_positive_with_a_finite_gradient_that_is_not_zero(name):
    """No term is silently 0."""
    leaves = make_leaves()
    assert evaluate(name, *leaves).item() > 0
    grads = read_gradients(name, leaves)
    assert all(grad.isfinite().all() for grad in grads)
    assert max(grad.abs().max().item() for grad in grads) > 1e-8


@pytest.mark.parametrize("name", [name for name in INCIDENT_TERMS if name != "align"])
@pytest.mark.parametrize("case", ["zero factor", "equal columns", "exact match"])
def test_awkward_inputs_keep_value_and_gradient_finite(name, case):
    """No factor at all, a degenerate spectrum, a perfect prediction."""
    angle, ranges, factors, slots, logits = (leaf.detach() for leaf in make_leaves())
    if case == "zero factor":
        angle, ranges, factors = (torch.zeros_like(t) for t in (angle, ranges, factors))
    elif case == "equal columns":
        factors = factors[..., :1].expand(-1, -1, 2).clone()
    else:
        a = steer(place_elements(CONFIG.scenario), BATCH.points, wavenumber=20.94)
        factors, slots = (a * BATCH.power.sqrt()[..., None]).mT, BATCH.points
    leaves = tuple(t.clone().requires_grad_() for t in (angle, ranges, factors, slots, logits))
    assert evaluate(name, *leaves).isfinite()
    assert all(grad.isfinite().all() for grad in read_gradients(name, leaves))


def test_terms_and_weights_have_the_same_names():
    """One weight per term; each profile holds the weights of its own terms, in their order."""
    names = [f.name for f in fields(LossWeights)]
    assert {f"lam_{name}" for name in SOUND_TERMS} == set(names)
    assert list(Objective(CONFIG).list_weights()) == names[:13]
    assert {f"lam_{name}" for name in INCIDENT_TERMS} == set(names[:13])


def test_weight_zero_leaves_the_term_out():
    """Not multiplied by 0: absent."""
    objective = Objective(CONFIG)
    leaves = make_leaves()
    assert "align" in objective(predict(*leaves), BATCH)
    assert "subspace_align" not in objective(predict(*leaves), BATCH)
    objective.reweight("lam_align", 0.0)
    objective.reweight("lam_subspace_align", 0.2)
    terms = objective(predict(*leaves), BATCH)
    assert "align" not in terms
    assert terms["subspace_align"].item() == pytest.approx(
        0.2 * evaluate("subspace_align", *leaves).item()
    )


def test_unknown_weight_lists_the_known_ones():
    """The sentence names what came and what would work."""
    with pytest.raises(ValueError, match=r"no weight 'align'; choose one of lam_cov, .*lam_align"):
        Objective(CONFIG).reweight("align", 0.0)


def test_matching_ignores_the_order_of_the_slots():
    """Slots in reverse order match the same sources at the same cost."""
    points = BATCH.points
    matched = pick_slots(points.flip(1), match_slots(points.flip(1), BATCH))
    assert torch.equal(matched[BATCH.active], points[BATCH.active])


def test_matching_takes_half_precision():
    """BF16 slots against FP64 labels."""
    slots = BATCH.points.flip(1).bfloat16()
    matched = pick_slots(slots, match_slots(slots, BATCH))
    assert torch.allclose(matched[BATCH.active].double(), BATCH.points[BATCH.active], atol=0.02)


def test_perfect_slots_cost_nothing():
    """aux, peak and range are 0 at an exact match."""
    leaves = list(make_leaves())
    leaves[3] = BATCH.points.flip(1)
    for name in ("aux", "peak", "range"):
        assert evaluate(name, *leaves).item() == pytest.approx(0.0, abs=1e-12)


def test_true_factors_leave_the_true_subspace_clean():
    """subspace_align falls when the factors are the steering vectors."""
    leaves = list(make_leaves())
    before = evaluate("subspace_align", *leaves).item()
    a = steer(place_elements(CONFIG.scenario), BATCH.points, wavenumber=20.943951)
    leaves[2] = (a * BATCH.power.sqrt()[..., None]).mT
    assert evaluate("subspace_align", *leaves).item() < 0.3 * before


def test_peak_contrast_prefers_the_true_covariance():
    """MVDR peaks at the source: the right sign."""
    leaves = list(make_leaves())
    before = evaluate("peak_contrast", *leaves).item()
    a = steer(place_elements(CONFIG.scenario), BATCH.points, wavenumber=20.943951)
    leaves[2] = (a * BATCH.power.sqrt()[..., None]).mT
    assert evaluate("peak_contrast", *leaves).item() < before


def test_angles_wrap():
    """A difference of 2 pi is none."""
    angle = torch.tensor([0.1, 0.1 + 2 * torch.pi, 0.1 - 2 * torch.pi, 3.2])
    expected = torch.tensor([0.1, 0.1, 0.1, 3.2 - 2 * torch.pi])
    assert torch.allclose(wrap_angle(angle), expected, atol=1e-6)


def test_terms_keep_the_precision_of_their_inputs():
    """FP64 in, FP64 out; labels in FP32 do not lower it; BF16 is raised to FP32."""
    objective = Objective(CONFIG)
    leaves = make_leaves()
    for batch in (BATCH, make_batch(torch.float32)):
        assert objective(predict(*leaves), batch)["cov"].dtype == torch.float64
    single = [leaf.detach().to(torch.complex64) for leaf in leaves[:3]]
    halves = [leaf.detach().bfloat16() for leaf in leaves[3:]]
    terms = objective(predict(*single, *halves), make_batch(torch.float32))
    assert {term.dtype for term in terms.values()} == {torch.float32}
