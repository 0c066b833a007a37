"""Subject: the incident, reproduced and cured, and the options."""

import math
import warnings
from dataclasses import fields, replace

import pytest
import torch

from ris_model.data import Batch
from ris_model.subject import Subject, build, incident

pytestmark = pytest.mark.usefixtures("one_thread")


def widen(batch: Batch) -> Batch:
    """The batch in double precision."""
    kinds = {torch.float32: torch.float64, torch.complex64: torch.complex128}
    wide = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(batch, **{n: t.to(kinds.get(t.dtype, t.dtype)) for n, t in wide.items()})


def run(subject: Subject, batch: Batch | None = None) -> tuple[float, dict[str, bool]]:
    """Loss of batch 0, and whether each group's gradient is finite."""
    torch.manual_seed(subject.seed)
    batch = batch or subject.batches(0)
    loss = sum(subject.loss_fn(subject.model, batch).values())
    loss.backward()
    finite = {}
    for group, (prefix,) in subject.groups.items():
        grads = [p.grad for p in subject.model.get_submodule(prefix).parameters()]
        finite[group] = all(g.isfinite().all().item() for g in grads if g is not None)
    return loss.item(), finite


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_incident_has_a_finite_loss_and_nan_gradients(preset, seed):
    """Backbone and head, on batch 0, whatever the initialisation."""
    loss, finite = run(incident(preset, seed, batch_size=8))
    assert math.isfinite(loss)
    assert finite == {"backbone": False, "head": False}


def test_incident_at_full_size():
    """The case report's size: NaN with four scenes already."""
    loss, finite = run(incident("full", batch_size=4))
    assert 2 < loss < 6
    assert finite == {"backbone": False, "head": False}


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_incident_does_not_depend_on_amp(amp):
    """AMP is not the cause."""
    loss, finite = run(incident("tiny", amp=amp))
    assert math.isfinite(loss)
    assert finite == {"backbone": False, "head": False}


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_incident_stays_in_double_precision(preset):
    """FP64 does not cure a degeneracy."""
    subject = incident(preset, batch_size=8)
    subject.model.double()
    loss, finite = run(subject, widen(subject.batches(0)))
    assert math.isfinite(loss)
    assert finite == {"backbone": False, "head": False}


@pytest.mark.parametrize(
    ("name", "cured"),
    [("lam_align", True), ("lam_gap", False), ("lam_margin", False), ("lam_cov", False)],
)
def test_only_the_second_alignment_term_is_the_cause(name, cured):
    """Without align everything is finite; without the eigengap hinge nothing changes."""
    subject = incident("small", batch_size=8)
    subject.reweight(name, 0.0)
    assert subject.weights()[name] == 0.0
    _, finite = run(subject)
    assert finite == {"backbone": cured, "head": cured}


def test_align_alone_is_enough():
    """With every other weight at 0 the gradient is NaN still."""
    subject = incident("tiny")
    for name in subject.weights():
        subject.reweight(name, 0.002 if name == "lam_align" else 0.0)
    assert list(subject.loss_fn(subject.model, subject.batches(0))) == ["align"]
    assert run(subject)[1] == {"backbone": False, "head": False}


def test_nan_is_born_in_the_backward_of_eigh():
    """The anomaly mode names LinalgEighBackward0."""
    subject = incident("tiny")
    batch = subject.batches(0)
    with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(True):
        # the mode warns where it finds the NaN, with the whole forward stack
        warnings.simplefilter("ignore")
        loss = sum(subject.loss_fn(subject.model, batch).values())
        with pytest.raises(RuntimeError, match="LinalgEighBackward0"):
            loss.backward()


def test_maps_get_no_gradient():
    """The loss never reads the soft-argmax head; every other parameter has a gradient."""
    subject = incident("tiny")
    run(subject)
    unread = [name for name, p in subject.model.named_parameters() if p.grad is None]
    assert unread == ["head.grid.weight", "head.grid.bias"]


def test_subject_carries_what_a_step_needs():
    """Names, rates, weights; a scaler for fp16 only."""
    subject = build("incident", "tiny", seed="3", amp="fp16", batch_size="2")
    assert (subject.name, subject.seed) == ("ris:incident", 3)
    assert subject.batches(0).samples == 2
    assert [g["lr"] for g in subject.optimizer.param_groups] == pytest.approx([3e-4, 1.2e-3])
    assert subject.scaler is not None
    assert subject.scheduler is None
    assert incident("tiny").scaler is None
    weights = subject.weights()
    assert (weights["lam_gap"], weights["lam_align"]) == (0.012, 0.002)
    assert weights["lam_subspace_align"] == 0.0


def test_seed_decides_parameters_and_leaves_the_random_state_alone():
    """Same seed, same model; the caller's generator does not move."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (incident("tiny", seed).model.head.angles.weight for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"profile": "x"}, "there is no profile 'x'; choose one of incident, sound"),
        ({"preset": "huge"}, "there is no preset 'huge'; choose one of tiny, small, full"),
        ({"amp": "fp8"}, "amp='fp8' is not known; choose one of off, bf16, fp16"),
        ({"batch_size": -1}, "batch_size is -1; give a whole number from 1 to 100000"),
        ({"batch_size": "many"}, "batch_size is 'many'; give a whole number from 1 to 100000"),
        ({"seed": -1}, f"seed is -1; give a whole number from 0 to {2**63 - 1}"),
    ],
)
def test_wrong_option_is_answered_in_one_sentence(options, sentence):
    """What was wrong, what came, what would work."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the whole sentence is compared
        build(**{"preset": "tiny", **options})
    assert str(caught.value) == sentence


@pytest.mark.parametrize("index", [-1, 12_500])
def test_batch_out_of_range_names_the_range(index):
    """The training split has 100,000 scenes."""
    with pytest.raises(IndexError, match=f"no batch {index}; .* has batches 0 to 12499"):
        incident("tiny").batches(index)


@pytest.mark.parametrize("profile", ["incident", "sound"])
def test_configured_weights_are_those_of_the_live_objective(profile):
    """What the configuration says and what the objective holds agree until one is set."""
    subject = build(profile, "tiny")
    live = subject.weights()
    assert {name: subject.configured[name] for name in live} == live
    subject.reweight("lam_K", 7.0)
    assert subject.configured["lam_K"] != subject.weights()["lam_K"] == 7.0
