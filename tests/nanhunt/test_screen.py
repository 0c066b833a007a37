"""The screen: what it clears is finite, also where it looks at a part of the output only."""

import pytest
import torch

from nanhunt.recorder import Recorder
from nanhunt.recorder.schema import op_info
from nanhunt.recorder.screen import is_clear, is_clear_at_first, is_cleared

aten = torch.ops.aten
LARGE = (64, 512)


def clears(func, *args):
    """Whether the shortcut of an op clears what it returns."""
    shortcut = op_info(func).shortcut
    return shortcut is not None and shortcut(args, func(*args))


def plain():
    """Large finite numbers."""
    return torch.randn(LARGE, generator=torch.Generator().manual_seed(0))


def with_one(value, at=(3, 5)):
    """The same with one number replaced."""
    x = plain()
    x[at] = value
    return x


def layer_norm(x, weight=1.0, bias=0.0):
    """The arguments of a layer norm."""
    return x, [512], torch.full((512,), weight), torch.full((512,), bias), 1e-5


def batch_norm(x, weight=1.0, running=0.0, training=True):
    """The arguments of a batch norm over 512 channels."""
    state = torch.full((512,), running), torch.ones(512)
    return x, torch.full((512,), weight), None, *state, training, 0.1, 1e-5


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten._softmax.default, (plain(), -1, False)),
        (aten._softmax.default, (plain(), 0, False)),
        (aten._softmax.default, (with_one(-torch.inf), -1, False)),
        (aten.native_layer_norm.default, layer_norm(plain())),
        (aten.native_batch_norm.default, batch_norm(plain())),
        (aten.mul.Tensor, (plain(), 0.5)),
        (aten.div.Tensor, (plain(), -2)),
        (aten.tanh.default, (plain(),)),
        (aten.gelu.default, (with_one(-3e38),)),
        (aten.silu.default, (with_one(-3e38),)),
        (aten.sigmoid.default, (with_one(3e38),)),
    ],
)
def test_shortcuts_clear_finite_values(func, args):
    """What is finite is known to be so, and it is."""
    assert clears(func, *args)
    returned = func(*args)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    assert all(bool(tensor.isfinite().all()) for tensor in outputs)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("at", [(0, 0), (63, 511), (17, 300)])
def test_normalisations_are_not_cleared_of_what_may_be_non_finite(value, at):
    """One number that is not finite, or too large to tell, shows in the statistics."""
    x = with_one(value, at)
    assert not clears(aten.native_layer_norm.default, *layer_norm(x))
    assert not clears(aten.native_batch_norm.default, *batch_norm(x))


def test_normalisations_are_not_cleared_with_extreme_weights():
    """Finite statistics do not make the product with a large weight finite."""
    for weight in (1e38, torch.inf, torch.nan):
        assert not clears(aten.native_layer_norm.default, *layer_norm(plain(), weight))
        assert not clears(aten.native_batch_norm.default, *batch_norm(plain(), weight))
    assert not clears(aten.native_layer_norm.default, *layer_norm(plain(), bias=torch.nan))
    assert not clears(aten.native_batch_norm.default, *batch_norm(plain(), running=torch.nan))
    assert not clears(aten.native_batch_norm.default, *batch_norm(plain(), training=False))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_rows_of_a_softmax_are_not_cleared(value, dim):
    """A row with one NaN or +inf is NaN throughout, so its first element tells."""
    for at in ((0, 0), (63, 511), (17, 300)):
        assert not clears(aten._softmax.default, with_one(value, at), dim, False)
    x = plain()
    x[9] = -torch.inf
    assert not clears(aten._softmax.default, x, -1, False)


@pytest.mark.parametrize("factor", [2.0, torch.inf, torch.nan])
def test_factors_above_one_are_no_shortcut(factor):
    """A product may overflow, and so may a quotient."""
    assert not clears(aten.mul.Tensor, plain(), factor)
    assert not clears(aten.div.Tensor, plain(), 1 / factor)
    assert not clears(aten.div.Tensor, plain(), 0.0)
    assert not clears(aten.mul.Tensor, plain(), plain())


def test_complex_functions_are_no_shortcut():
    """The hyperbolic tangent of a complex number has poles."""
    z = torch.complex(plain(), plain())
    assert not clears(aten.tanh.default, z)
    assert not clears(aten.mul.Tensor, z, 0.5)


def test_looks_find_every_kind_of_number():
    """A NaN or an infinity anywhere is never cleared, in any layout or dtype."""
    for value in (torch.nan, torch.inf, -torch.inf):
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            x = with_one(value).to(dtype)
            assert not any(map(is_clear, (x, x.T, x[:, 5:6], x.to_sparse())))
            assert is_clear(plain().to(dtype))
            assert not is_cleared(None, (), None, [plain(), x])
            assert not is_clear_at_first((x,))
    assert is_clear(torch.ones(3, dtype=torch.long))
    assert not is_clear_at_first(([plain()],))  # a list is left to those who measure it


def test_infinity_from_outside_is_met_behind_a_shortcut():
    """A tensor that no op made is not cleared along with what was computed of it."""
    outside = with_one(torch.inf)
    recorder = Recorder()
    with recorder.recording():
        total = (outside * 0.5).exp().sum()
    assert total.isinf()
    assert recorder.sources_of(total)
    assert recorder.state[0].facts.posinf == 1


def test_birth_behind_a_cleared_op_is_named():
    """What overflows after ops that took a shortcut is a birth of its own."""
    x = plain()
    recorder = Recorder()
    with recorder.recording():
        (x.tanh() * 0.5 * 3e38 * 8).sum()
    births = [event.op for event in recorder.events() if event.birth is not None]
    assert births == ["aten::mul"]
