"""What the gate measures: as few steps as will do, and the same answer."""

import pytest
import torch
from torch import nn

from nanhunt import gating
from nanhunt.gate import Gated
from nanhunt.gating import examine


@pytest.fixture
def counted(monkeypatch):
    """Examines a loss; gives the report and the variants that were replayed, in order."""

    def run(loss_fn, *variants):
        done = []
        plain = gating.replay

        def noting(subject, batch, variant, **kwargs):
            done.append(variant.name)
            return plain(subject, batch, variant, **kwargs)

        monkeypatch.setattr(gating, "replay", noting)
        torch.manual_seed(0)
        subject = (nn.Linear(4, 2), (torch.randn(3, 4),), loss_fn)
        return examine(subject, Gated(subject="s", variants=variants)), done

    return run


def test_fp32_stands_for_the_second_native_replay(counted):
    """A step that is in FP32 throughout has been run twice when FP32 gives the same bits."""
    report, done = counted(lambda m, x: m(x).square().mean(), "native", "fp32")
    assert (report.deterministic, done) == (True, ["native", "fp32"])


def test_other_bits_ask_for_a_second_native_replay(counted):
    """Where FP32 is another step, the native one is replayed again."""
    wide = lambda m, x: (m(x).double() / 3).square().mean()
    report, done = counted(wide, "native", "fp32")
    assert (report.deterministic, done) == (True, ["native", "fp32", "native"])


def test_a_step_that_varies_is_found(counted):
    """Neither replay agrees with the first, which is told."""
    calls = []

    def loss(model, x):
        calls.append(1)
        return model(x).square().mean() * len(calls)

    report, _ = counted(loss, "native", "fp32")
    assert report.deterministic is False


def test_scale_search_starts_where_the_native_gradients_fit(counted):
    """Gradients of 2e4 do not fit FP16 at 65536: the first scale tried is one at which they do."""
    report, _ = counted(lambda m, x: 2e4 * m(x).sum(), "native", "amp-fp16")
    run = report.runs[-1]
    assert run.is_finite
    assert run.scale is None  # 1: nothing larger would do
    assert not [note for note in run.notes if "overflow" in note]


def test_scale_search_goes_down_where_more_than_the_gradients_must_fit(counted):
    """A large gradient inside of the step asks for a smaller scale than the gradients show."""
    report, _ = counted(lambda m, x: (m(x) * 1e-3).half().sum() * 1e3 * 1e-2, "native", "amp-fp16")
    run = report.runs[-1]
    assert run.is_finite
    assert "gradients overflow at loss scale" in " ".join(run.notes)


def test_a_step_that_no_scale_makes_finite_is_not(counted):
    """With the shorter search too, a step that fails at scale 1 has failed."""
    report, _ = counted(lambda m, x: (m(x) * 1e4 * 1e4).float().sum(), "native", "amp-fp16")
    assert report.verdict == "at_risk"
    assert not next(run for run in report.runs if run.variant == "amp-fp16").is_finite
