"""The sound profile: decoding, every term on awkward inputs, finite gradients everywhere."""

import contextlib
from dataclasses import fields, replace

import pytest
import torch
from torch.autograd import gradcheck

from ris_model.cells import lay_cells
from ris_model.config import PRESETS, apply_profile
from ris_model.covariance import (
    choose_shrinkage,
    form_blend,
    form_effective,
    form_sources,
    shrink,
)
from ris_model.data import Batch, draw_batch, form_true
from ris_model.geometry import place_elements, steer
from ris_model.linalg import project_signal
from ris_model.losses import SOUND_TERMS, SoundObjective, match_slots, prepare_detection
from ris_model.losses.terms import SHARED, Comparison, DenseComparison
from ris_model.network import Detection, Detector, decode
from ris_model.subject import Subject, sound
from ris_model.training import safe_step

CONFIG = apply_profile(PRESETS["tiny"], "sound")
WORLD = CONFIG.scenario
CELLS = lay_cells(WORLD, CONFIG.detector)
LEAVES = tuple(field.name for field in fields(Detection))
KINDS = {torch.float32: torch.float64, torch.complex64: torch.complex128}


pytestmark = pytest.mark.usefixtures("one_thread")


def widen(batch: Batch) -> Batch:
    """The batch in double precision."""
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(batch, **{n: t.to(KINDS.get(t.dtype, t.dtype)) for n, t in tensors.items()})


BATCH = widen(draw_batch(WORLD, seed=3, split="train", index=0, size=4))


def draw_detection(noise: float = 2.0) -> Detection:
    """Random numbers in every cell; the noise makes the eigengaps small."""
    torch.manual_seed(1)
    size = (4, CELLS.total)
    return Detection(
        heat=torch.randn(size).double(),
        offsets=0.4 * torch.randn(*size, 3).double(),
        log_scales=0.3 * torch.randn(*size, 3).double(),
        log_power=torch.randn(size).double(),
        log_noise=torch.full((4,), noise).double(),
        k_logits=torch.randn(4, 2).double(),
    )


def plant(points: torch.Tensor, power: torch.Tensor) -> Detection:
    """A heat map that knows the sources: [B, K, 3] points, [B, K] powers, all noise gone."""
    flat = replace(draw_detection(), log_noise=torch.full((4,), -60.0).double())
    place = CELLS.locate(points)
    index = CELLS.flatten(place)
    spread = index[..., None].expand(-1, -1, 3)
    heat = torch.zeros_like(flat.heat).scatter(1, index, 30.0 * (power > 0).double())
    return replace(
        flat,
        heat=heat,
        offsets=torch.zeros_like(flat.offsets).scatter(1, spread, place - place.round()),
        log_power=torch.zeros_like(heat).scatter(1, index, power.clamp_min(1e-30).log()),
    )


def coincide() -> Detection:
    """Two peaks whose offsets lead to one and the same point: rank 1 where K is 2."""
    detection = draw_detection(noise=-60.0)
    index = CELLS.flatten(torch.tensor([[4.0, 3.0, 0.0], [4.0, 3.0, 3.0]]))
    heat, offsets = torch.zeros_like(detection.heat), torch.zeros_like(detection.offsets)
    heat[:, index] = 30.0
    offsets[:, index, 2] = torch.tensor([1.5, -1.5]).double()
    return replace(
        detection, heat=heat, offsets=offsets, log_power=torch.zeros_like(detection.log_power)
    )


CASES = {
    "random": draw_detection(),
    "exact match": plant(BATCH.points, BATCH.power / BATCH.power.amax(-1, keepdim=True)),
    "one point": coincide(),
    "no power": replace(
        draw_detection(-400.0), log_power=torch.full_like(draw_detection().log_power, -400.0)
    ),
    "no noise": draw_detection(-400.0),
}


def evaluate(name: str, *leaves: torch.Tensor) -> torch.Tensor:
    """One unweighted term."""
    detection = Detection(**dict(zip(LEAVES, leaves, strict=True)))
    return SOUND_TERMS[name](CONFIG)(prepare_detection(detection, BATCH, CONFIG))


def take_leaves(detection: Detection, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Its tensors, as leaves."""
    return tuple(getattr(detection, name).to(dtype).requires_grad_() for name in LEAVES)


def read_gradients(value: torch.Tensor, leaves: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """The gradients that exist."""
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    return [grad for grad in grads if grad is not None]


def test_detection_has_its_shapes():
    """Numbers per cell and per scene, within their bounds."""
    torch.manual_seed(0)
    detection = Detector(CONFIG)(draw_batch(WORLD, seed=0, split="train", index=0, size=3))
    shapes = {name: tuple(getattr(detection, name).shape) for name in LEAVES}
    assert shapes == {
        "heat": (3, 252),
        "offsets": (3, 252, 3),
        "log_scales": (3, 252, 3),
        "log_power": (3, 252),
        "log_noise": (3,),
        "k_logits": (3, 2),
    }
    assert detection.offsets.abs().max() < 1.5


@pytest.mark.parametrize(
    ("preset", "count"), [("tiny", 5_019), ("small", 88_683), ("full", 421_696)]
)
def test_network_is_small(preset, count):
    """Far below the limit of 12 million parameters at every size."""
    with torch.device("meta"):
        model = Detector(PRESETS[preset])
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_detection_is_single_precision_under_autocast(dtype):
    """The convolutions run in half, what is said of the cells does not."""
    batch = draw_batch(WORLD, seed=0, split="train", index=0, size=2)
    with torch.autocast("cpu", dtype=dtype):
        detection = Detector(CONFIG)(batch)
    assert {getattr(detection, name).dtype for name in LEAVES} == {torch.float32}
    assert all(getattr(detection, name).isfinite().all() for name in LEAVES)


def test_decoding_finds_the_planted_sources():
    """A perfect heat map gives back points and powers, in some order."""
    sources = decode(CASES["exact match"], CELLS, 2)
    order = prepare_detection(CASES["exact match"], BATCH, CONFIG)
    assert torch.allclose(order.matched[BATCH.active], BATCH.points[BATCH.active], atol=1e-9)
    lone = BATCH.count == 1
    assert torch.allclose(sources.points[lone, 0], BATCH.points[lone, 0], atol=1e-9)


def test_covariance_of_decoded_sources_is_the_true_one():
    """Built from a perfect detection it equals form_true of the labels."""
    view = prepare_detection(CASES["exact match"], BATCH, CONFIG)
    dense = view.r_pred.expand(view.basis)
    assert torch.allclose(dense, BATCH.r_true, atol=1e-5)
    a = steer(place_elements(WORLD), BATCH.points, wavenumber=WORLD.wavenumber)
    assert torch.equal(form_sources(a, BATCH.power), form_true(a, BATCH.power))
    assert torch.allclose(dense, form_true(a, BATCH.power), atol=1e-9)


def test_order_of_the_peaks_does_not_matter():
    """Hungarian matching: two peaks in the other order, every term but the heat map's the same."""
    detection = CASES["exact match"]
    cells = decode(detection, CELLS, 2).cells
    cooler = replace(detection, heat=detection.heat.scatter(1, cells[:, :1], 29.0))
    pairs = BATCH.count == 2
    assert pairs.any()
    assert torch.equal(decode(cooler, CELLS, 2).cells[pairs], cells[pairs].flip(-1))
    for name in set(SOUND_TERMS) - {"heatmap"}:
        values = [
            evaluate(name, *take_leaves(d, torch.float64)).item() for d in (detection, cooler)
        ]
        assert values[0] == pytest.approx(values[1], abs=1e-12)


@pytest.mark.parametrize("name", SOUND_TERMS)
def test_gradient_equals_finite_differences(name):
    """Every term on random numbers, in double precision."""
    leaves = take_leaves(CASES["random"], torch.float64)
    assert gradcheck(lambda *x: evaluate(name, *x), leaves, fast_mode=True, atol=1e-5)


@pytest.mark.parametrize("name", SOUND_TERMS)
def test_term_is_positive_with_a_finite_gradient_that_is_not_zero(name):
    """No term is silently 0."""
    leaves = take_leaves(CASES["random"], torch.float64)
    value = evaluate(name, *leaves)
    grads = read_gradients(value, leaves)
    assert value.item() > 0
    assert all(grad.isfinite().all() for grad in grads)
    assert max(grad.abs().max().item() for grad in grads) > 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SOUND_TERMS)
def test_awkward_inputs_keep_value_and_gradient_finite(name, case, dtype):
    """Exact match, sources at one point, no power at all, K above the rank."""
    leaves = take_leaves(CASES[case], dtype)
    value = evaluate(name, *leaves)
    assert value.isfinite()
    assert all(grad.isfinite().all() for grad in read_gradients(value, leaves))


DENSE = ("cov", "cov_pred", "align", "subspace_align", "peak_contrast")


def evaluate_densely(name: str, *leaves: torch.Tensor) -> torch.Tensor:
    """The same term with whole N x N matrices."""
    detection = Detection(**dict(zip(LEAVES, leaves, strict=True)))
    view = prepare_detection(detection, BATCH, CONFIG)
    form = CONFIG.covariance
    power = view.detection.log_power.gather(1, decode(detection, CELLS, 2).cells)
    order = match_slots(decode(detection, CELLS, 2).points, BATCH)
    power = power.gather(1, order).exp() * BATCH.active
    a = steer(place_elements(WORLD), view.matched, wavenumber=WORLD.wavenumber)
    r = form_sources(a * BATCH.active[..., None], power, detection.log_noise.exp())
    r_blend = form_blend(r, BATCH.r_samp, blend=form.blend)
    if name == "align":
        outside = view.factors - project_signal(r_blend, BATCH.count) @ view.factors
        return (outside.abs().square().sum((-2, -1)) / BATCH.count).mean()
    dense = DenseComparison(
        **{f.name: getattr(view, f.name) for f in fields(Comparison)},
        r_hat=r / 16,
        r_pred=form_effective(r, BATCH.snr_db, form=form),
        r_blend=r_blend,
        r_effective=form_effective(r_blend, BATCH.snr_db, form=form),
        r_target=shrink(BATCH.r_true, choose_shrinkage(BATCH.snr_db, form)),
    )
    return SHARED[name](CONFIG)(dense)


@pytest.mark.parametrize("case", ["random", "exact match", "one point", "no noise"])
@pytest.mark.parametrize("name", DENSE)
def test_compact_terms_equal_those_of_whole_matrices(name, case):
    """Value and gradient, in double precision; the labels of a batch are single."""
    leaves = take_leaves(CASES[case], torch.float64)
    values = [run(name, *leaves) for run in (evaluate, evaluate_densely)]
    assert values[0].item() == pytest.approx(values[1].item(), rel=2e-5, abs=2e-6)
    grads = [torch.autograd.grad(v, leaves, allow_unused=True) for v in values]
    for mine, theirs in zip(*grads, strict=True):
        if theirs is not None:
            assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-5 * (1 + theirs.abs().max()))


def test_perfect_detection_costs_nothing():
    """Points, angle and range columns of an exact match."""
    leaves = take_leaves(CASES["exact match"], torch.float64)
    for name in ("aux", "peak", "range", "ortho", "cross"):
        assert evaluate(name, *leaves).item() == pytest.approx(0.0, abs=1e-12)
    assert evaluate("cov_pred", *leaves) < 1e-3


def test_detection_that_is_not_finite_gives_losses_that_are_not():
    """No decomposition raises, no term is spared."""
    broken = replace(CASES["random"], heat=CASES["random"].heat + torch.inf)
    terms = SoundObjective(CONFIG)(broken, BATCH)
    assert list(terms) == list(SoundObjective(CONFIG).terms)
    assert not any(term.isfinite() for term in terms.values())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["y", "h", "codes", "ptr", "power", "snr_db", "r_samp"])
def test_batch_that_is_not_finite_is_skipped(name, value):
    """One number of one scene, wherever it stands: no exception, and nothing is learnt from it."""
    subject = sound("tiny", 0, batch_size=4)
    batch = subject.batches(0)
    tensor = getattr(batch, name).clone()
    tensor.view(-1)[3] = value
    before = {n: p.clone() for n, p in subject.model.named_parameters()}
    outcome = safe_step(subject, replace(batch, **{name: tensor}))
    assert outcome.reason == "loss not finite"
    assert all(torch.equal(before[n], p) for n, p in subject.model.named_parameters())
    assert safe_step(subject, batch).stepped


def assert_finite_gradients(subject: Subject, batch: Batch, stack: contextlib.ExitStack) -> None:
    """Every parameter has one, and all its entries are finite."""
    with stack:
        terms = subject.loss_fn(subject.model, batch)
    subject.optimizer.zero_grad()
    torch.stack(list(terms.values())).sum().backward()
    for name, parameter in subject.model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def vary(preset: str, seed: int, variant: str, size: int) -> None:
    """One variant on two batches."""
    amp = {"bf16 network": "bf16", "fp16 network": "fp16"}.get(variant, "off")
    subject = sound(preset, seed, amp=amp, batch_size=size)
    for index in (0, 1):
        batch, stack = subject.batches(index), contextlib.ExitStack()
        if variant == "float64":
            subject.model.double()
            batch = widen(batch)
        if variant.endswith("whole"):
            dtype = torch.bfloat16 if variant.startswith("bf16") else torch.float16
            stack.enter_context(torch.autocast("cpu", dtype=dtype))
        assert_finite_gradients(subject, batch, stack)


VARIANTS = ["native", "float64", "bf16 network", "fp16 network", "bf16 whole", "fp16 whole"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("preset", "size"), [("tiny", 8), ("small", 4)])
def test_every_gradient_is_finite(preset, size, seed, variant):
    """In every precision, for several initialisations and batches."""
    vary(preset, seed, variant, size)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_gradient_is_finite_at_full_size(variant):
    """144 elements, five sources."""
    vary("full", 0, variant, 2)
