"""Variants: the names, the copies of a batch, and what each one changes."""

import pytest
import torch
from torch import nn

from nanhunt.errors import UsageError
from nanhunt.subject import Subject
from nanhunt.variants import (
    DEFAULT,
    NATIVE,
    VARIANTS,
    above,
    beneath,
    cast_batch,
    cast_model,
    device_of,
    variant,
)


def subject_of(model, optimizer=None):
    return Subject(model, [torch.ones(1, 2)], lambda m, x: m(x).sum(), optimizer=optimizer)


def test_names():
    """Each variant is found by its own name, and every default is one."""
    assert all(variant(name).name == name for name in VARIANTS)
    assert all(name in VARIANTS for name in DEFAULT)
    assert variant("native") == NATIVE


@pytest.mark.parametrize(
    ("name", "hint"), [("fp46", "did you mean fp64? "), ("amp-fp16-nett", "did you mean amp-fp16")]
)
def test_unknown_name_is_answered_with_a_hint(name, hint):
    """What came, what was meant, what there is."""
    with pytest.raises(UsageError) as caught:
        variant(name)
    assert str(caught.value).startswith(f"no precision is called {name!r}; {hint}")
    assert str(caught.value).endswith("known: " + ", ".join(VARIANTS))
    with pytest.raises(UsageError, match="no precision is called 'quantum'; known: native"):
        variant("quantum")


def test_ablations_add_up_and_change_nothing_else():
    """`ablated` and `only` are the same variant but for the objective."""
    both = VARIANTS["fp64"].ablated("a").ablated("b", "c")
    assert (both.without, both.precision, both.name) == (("a", "b", "c"), "float64", "fp64")
    assert NATIVE.only("a", "b").alone == ("a", "b")
    assert NATIVE.without == NATIVE.alone == ()


@pytest.mark.parametrize("name", ["native", "fp64", "fp32"])
def test_batch_is_copied_in_the_precision(name):
    """Floating and complex tensors are cast, others kept; aliases stay aliases."""
    x = torch.ones(2, requires_grad=True)
    batch = {"x": x, "again": x, "n": torch.arange(2), "z": torch.ones(2, dtype=torch.complex64)}
    copied = cast_batch(VARIANTS[name], batch)
    wide = name == "fp64"
    assert copied["x"].dtype == (torch.float64 if wide else torch.float32)
    assert copied["z"].dtype == (torch.complex128 if wide else torch.complex64)
    assert copied["n"].dtype == torch.int64
    assert copied["x"] is copied["again"]
    assert copied["x"].requires_grad
    copied["x"].detach().zero_()
    assert x.tolist() == [1.0, 1.0]


def test_cast_reaches_buffers_complex_parameters_and_optimizer_state():
    """Counters keep their dtype: a step count of Adam is no number to be widened."""
    model = nn.BatchNorm1d(2)
    model.register_parameter("phase", nn.Parameter(torch.ones(2, dtype=torch.complex64)))
    optimizer = torch.optim.Adam(model.parameters())
    (model.weight.sum() + model.bias.sum() + model.phase.abs().sum()).backward()
    optimizer.step()
    cast_model(subject_of(model, optimizer), torch.float64)
    assert model.running_mean.dtype == model.weight.dtype == torch.float64
    assert model.phase.dtype == torch.complex128
    assert model.num_batches_tracked.dtype == torch.int64
    state = optimizer.state[model.weight]
    assert (state["exp_avg"].dtype, state["step"].dtype) == (torch.float64, torch.float32)


def run_under(name, model, x):
    subject = subject_of(model)
    with beneath() as execution, above(VARIANTS[name], subject, execution):
        inner = model(x)
        outer = x @ x.t()
    return inner.dtype, outer.dtype, execution


def test_autocast_of_the_step_or_of_the_network_alone():
    """`-net` leaves the loss in FP32 and hands it FP32 outputs."""
    x = torch.ones(2, 2)
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        inner, outer, _ = run_under(f"amp-{short}", nn.Linear(2, 2), x)
        assert (inner, outer) == (dtype, dtype)
        seen = []
        model = nn.Sequential(nn.Linear(2, 2))
        model[0].register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out.dtype))
        inner, outer, execution = run_under(f"amp-{short}-net", model, x)
        assert (inner, outer) == (torch.float32, torch.float32)
        assert seen == [dtype]
        assert execution.root_forwards == 1
        assert execution.half.used == (short == "fp16")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_autocast_is_left_when_the_network_raises(error):
    """No hook and no autocast stay behind."""

    class Failing(nn.Linear):
        def forward(self, x):
            raise error

    model = Failing(2, 2)
    with pytest.raises(error):
        run_under("amp-bf16-net", model, torch.ones(1, 2))
    assert not torch.is_autocast_enabled("cpu")
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_outputs_of_any_shape_leave_the_network_in_single():
    """Mappings and tuples too; None stays None."""

    class Many(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return {"y": y, "both": (y, y.argmax(-1)), "none": None}

    subject = subject_of(model := Many(2, 2))
    with beneath() as execution, above(VARIANTS["amp-bf16-net"], subject, execution):
        out = model(torch.ones(1, 2))
    assert (out["y"].dtype, out["both"][0].dtype) == (torch.float32, torch.float32)
    assert (out["both"][1].dtype, out["none"]) == (torch.int64, None)


def test_device_is_that_of_the_first_parameter():
    """A model without parameters is on the CPU."""
    assert device_of(nn.Linear(1, 1)) == "cpu"
    assert device_of(nn.Linear(1, 1, device="meta")) == "meta"
    assert device_of(nn.ReLU()) == "cpu"
