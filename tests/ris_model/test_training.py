"""Training: the step is made or skipped, and a skipped one leaves nothing behind."""

import copy
import math
from collections.abc import Callable

import pytest
import torch

from ris_model.subject import Subject, incident, sound
from ris_model.training import StepOutcome, safe_step, write_log

pytestmark = pytest.mark.usefixtures("one_thread")


def photograph(subject: Subject) -> dict:
    """Parameters, optimizer and scheduler, copied."""
    return copy.deepcopy(
        {
            "model": subject.model.state_dict(),
            "optimizer": subject.optimizer.state_dict(),
            "scheduler": subject.scheduler.state_dict()["last_epoch"],
        }
    )


def is_same(one, other) -> bool:
    """Equal to the bit, through containers."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    return one == other


def spoil(subject: Subject, value: float) -> Callable[[], None]:
    """Make one entry of one gradient what it should not be; returns the undoing."""

    def write(gradient: torch.Tensor) -> torch.Tensor:
        spoiled = gradient.clone()
        spoiled.view(-1)[0] = value
        return spoiled

    return next(subject.model.head.parameters()).register_hook(write).remove


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_finite_step_is_made(amp):
    """Parameters, optimizer and schedule move on; gradients are gone afterwards."""
    subject = sound("tiny", amp=amp)
    before = photograph(subject)
    outcome = safe_step(subject, subject.batches(0))
    after = photograph(subject)
    assert outcome.stepped
    assert outcome.reason == ""
    assert not outcome.found_inf
    assert not is_same(before["model"], after["model"])
    assert after["scheduler"] == before["scheduler"] + 1
    assert all(p.grad is None for p in subject.model.parameters())
    assert math.fsum(outcome.terms.values()) == pytest.approx(outcome.loss, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_step_with_a_non_finite_gradient_leaves_nothing_behind(amp, value):
    """Parameters, optimizer state and schedule are the same to the bit; the scale is halved."""
    subject = sound("tiny", amp=amp)
    safe_step(subject, subject.batches(0))
    before = photograph(subject)
    mend = spoil(subject, value)
    outcome = safe_step(subject, subject.batches(1))
    assert is_same(before, photograph(subject))
    assert not outcome.stepped
    assert outcome.found_inf
    assert outcome.reason == "gradients not finite"
    assert math.isfinite(outcome.norms["backbone"])
    assert not math.isfinite(outcome.norms["head"])
    assert all(p.grad is None for p in subject.model.parameters())
    if amp == "fp16":
        assert (outcome.scale, subject.scaler.get_scale()) == (1024.0, 512.0)
    mend()
    assert safe_step(subject, subject.batches(1)).stepped


def test_lines_of_a_skipped_step():
    """Exactly those of the case report."""
    subject = sound("tiny", amp="fp16")
    subject.reweight("lam_subspace_align", 0.0)
    spoil(subject, math.nan)
    outcome = safe_step(subject, subject.batches(0))
    assert list(write_log(outcome, subject.weights())) == [
        "[LOSS DEBUG] Subspace align: DISABLED (weight=0.0)",
        f"[DEBUG] Loss is finite: {outcome.loss:.6f}",
        f"[GRAD] backbone={outcome.norms['backbone']:.3e} head=nan ok=False",
        "[AMP] scale=1024 found_inf=1",
        "[STEP] Non-finite gradients detected, skipping step and zeroing grads",
    ]


def test_lines_of_other_outcomes():
    """A step that was made; a loss that is not finite."""
    made = StepOutcome(
        loss=3.5,
        terms={},
        norms={"backbone": 0.25, "head": 12.0},
        stepped=True,
        scale=None,
        found_inf=False,
        reason="",
    )
    assert list(write_log(made, {"lam_subspace_align": 0.02})) == [
        "[LOSS DEBUG] Subspace align: ENABLED (weight=0.02)",
        "[DEBUG] Loss is finite: 3.500000",
        "[GRAD] backbone=2.500e-01 head=1.200e+01 ok=True",
    ]
    subject = sound("tiny")
    torch.nn.init.constant_(subject.model.head.cells.bias, math.nan)
    before = photograph(subject)
    outcome = safe_step(subject, subject.batches(0))
    lines = list(write_log(outcome, subject.weights()))
    assert outcome.reason == "loss not finite"
    assert lines[1] == "[DEBUG] Loss is not finite: nan"
    assert lines[-1] == "[STEP] Loss not finite, skipping step and zeroing grads"
    assert before["scheduler"] == photograph(subject)["scheduler"]


def test_incident_is_skipped_every_time():
    """No step of the case report's system happens, and its NaN is not hidden."""
    subject = incident("tiny")
    before = copy.deepcopy(subject.model.state_dict())
    for index in range(2):
        outcome = safe_step(subject, subject.batches(index))
        assert math.isfinite(outcome.loss)
        assert all(map(math.isnan, outcome.norms.values()))
        assert not outcome.stepped
    assert is_same(before, subject.model.state_dict())
    assert subject.optimizer.state == {}


def test_gradients_reach_the_check_as_they_are(monkeypatch):
    """Nothing on the way replaces a non-finite value."""
    subject = incident("tiny")
    for module, name in ((torch, "nan_to_num"), (torch.Tensor, "nan_to_num_")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a gradient was cleaned"))
    assert all(map(math.isnan, safe_step(subject, subject.batches(0)).norms.values()))


def test_scaler_finds_its_scale_after_an_overflow():
    """FP16 at a scale that is far too large: skipped and halved until a step fits."""
    subject = sound("tiny", amp="fp16")
    subject.scaler.scale(torch.zeros(()))  # a scaler has no scale before its first use
    subject.scaler.update(2.0**22)
    outcomes = [safe_step(subject, subject.batches(0)) for _ in range(10)]
    scales = [outcome.scale for outcome in outcomes]
    made = [outcome.stepped for outcome in outcomes]
    assert made == sorted(made)
    assert not made[0]
    assert made[-1]
    assert scales[: made.index(True) + 1] == [2.0 ** (22 - i) for i in range(made.index(True) + 1)]
    assert subject.scheduler.last_epoch == sum(made)


def test_loss_that_reaches_no_parameter_is_not_stepped():
    """Weight decay alone would still move the parameters."""
    subject = sound("tiny")
    before = photograph(subject)
    for parameter in subject.model.parameters():
        parameter.register_hook(torch.zeros_like)
    outcome = safe_step(subject, subject.batches(0))
    assert (outcome.stepped, outcome.reason) == (False, "gradients vanished")
    assert is_same(before, photograph(subject))


def test_large_gradients_are_clipped():
    """The norm reported is the true one; what is stepped is not longer than the limit."""
    subject = sound("tiny")
    seen = []
    subject.optimizer.register_step_pre_hook(
        lambda *_: seen.append(
            torch.nn.utils.get_total_norm([p.grad for p in subject.model.parameters()]).item()
        )
    )
    outcome = safe_step(subject, subject.batches(0), clip=0.5)
    assert math.hypot(*outcome.norms.values()) > 1
    assert seen == pytest.approx([0.5], rel=1e-4)


def test_rate_warms_up_and_falls():
    """Linear, then a cosine down to two percent."""
    scheduler = sound("tiny").scheduler
    share = scheduler.lr_lambdas[0]
    assert [share(0), share(24), share(49)] == pytest.approx([0.02, 0.5, 1.0])
    assert share(1225) == pytest.approx(0.51, abs=1e-3)
    assert share(2400) == share(9999) == pytest.approx(0.02)


def test_thirty_steps_learn():
    """The loss falls by more than a tenth, each step on a batch never seen before."""
    subject = sound("tiny", batch_size=16)
    losses = [safe_step(subject, subject.batches(index)).loss for index in range(30)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
