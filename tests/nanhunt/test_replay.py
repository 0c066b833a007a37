"""Replay: one step of one subject under one variant, and what it measures."""

import math
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from nanhunt.errors import SubjectError, UsageError
from nanhunt.recorder import Scope
from nanhunt.replay import INITIAL_SCALE, blame_terms, replay
from nanhunt.replay.ends import fingerprint
from nanhunt.subject import Subject
from nanhunt.variants import NATIVE, VARIANTS, Variant

INF, NAN = math.inf, math.nan
ONES = torch.ones(3)


class Scale(nn.Module):
    """One weight per element: what a loss does with it is the loss's own affair."""

    def __init__(self, *values):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(values or (1.0, 2.0, 3.0)))

    def forward(self, x):
        return self.weight * x


def run(loss_fn, batch=(ONES,), variant=NATIVE, model=None, **options):
    """Replay a step of `Scale` and return all of it."""
    scope = options.pop("scope", Scope())
    subject = Subject(model or Scale(), [batch], loss_fn, **options)
    return replay(subject, batch, variant, scope=scope)


# -- the loss and its terms ------------------------------------------------------------------------


def test_scalar_loss():
    """Loss, gradient norm and poisoned parameters, recorded or not."""
    done = run(lambda m, x: m(x).sum())
    assert (done.run.loss, done.run.terms, done.run.is_finite) == (6.0, (), True)
    assert done.run.groups[0].norm == pytest.approx(math.sqrt(3))
    assert done.run.ops == len(done.trace.events) > 0
    plain = run(lambda m, x: m(x).sum(), scope=None)
    assert (plain.trace, plain.run.ops, plain.run.loss) == (None, 0, 6.0)
    assert plain.fingerprint == done.fingerprint


def test_named_terms_are_summed():
    """A mapping without the key `loss` is a sum; each term has its value and its graph."""
    done = run(lambda m, x: {"a": m(x).sum(), "b": (m(x) ** 2).sum(), "c": 0.5})
    assert done.run.loss == 6.0 + 14.0 + 0.5
    assert [(t.name, t.value, t.has_graph) for t in done.run.terms] == [
        ("a", 6.0, True),
        ("b", 14.0, True),
        ("c", 0.5, False),
    ]


def test_the_loss_key_is_the_loss():
    """Then the terms are only named, and may be parts of a weighted sum."""

    def loss_fn(m, x):
        a, b = m(x).sum(), (m(x) ** 2).sum()
        return {"a": a, "b": b, "loss": a + 0.5 * b}

    done = run(loss_fn)
    assert done.run.loss == 13.0
    assert [t.name for t in done.run.terms] == ["a", "b"]
    with pytest.raises(UsageError, match="the loss is not the sum of the named terms"):
        run(loss_fn, variant=NATIVE.ablated("a"))


def test_ops_belong_to_the_one_term_that_needs_them():
    """A shared op belongs to none alone; the owners of a node are all that reach it."""

    def loss_fn(m, x):
        y = m(x)
        return {"exp": y.exp().mean(), "squares": y.square().sum()}

    done = run(loss_fn)
    counts = {t.name: (t.forward_ops, t.backward_ops) for t in done.run.terms}
    forward = {e.op: e.made for e in done.trace.events if e.phase == "forward"}
    owners = done.trace.owners
    assert owners[forward["aten::exp"]] == ("exp",)
    assert set(owners[forward["aten::mul"]]) == {"exp", "squares"}
    assert min(min(pair) for pair in counts.values()) >= 2
    alone = run(loss_fn, variant=NATIVE.ablated("exp")).run
    left = {t.name: (t.forward_ops, t.backward_ops) for t in alone.terms}
    assert left["exp"][1] == 0
    assert left["squares"] == counts["squares"]


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (lambda m, x: m(x), "the loss is to be a scalar; got shape [3]: reduce it, as by .mean()"),
        (lambda m, x: 3.0, "loss_fn is to return a scalar tensor or a mapping of terms; got float"),
        (lambda m, x: x.sum(), "the loss has no graph"),
        (lambda m, x: {"a": m(x)}, "the loss term 'a' is to be a scalar; got shape [3]"),
        (lambda m, x: {"a": "b"}, "the loss term 'a' is to be a tensor; got str"),
        (lambda m, x: m(x) @ torch.ones(4), "the step raised RuntimeError: "),
    ],
)
def test_what_is_no_loss_is_refused(value, sentence):
    """In one sentence; the step as given must run."""
    with pytest.raises(SubjectError) as caught:
        run(value)
    assert sentence in str(caught.value)


# -- ablations -------------------------------------------------------------------------------------


def terms(m, x):
    y = m(x)
    return {"good": y.sum(), "bad": (y - y).sqrt().sum()}


def test_term_taken_out_and_left_alone():
    """Without the faulty term, and with it alone."""
    assert not run(terms).run.is_finite
    without = run(terms, variant=NATIVE.ablated("bad")).run
    assert (without.is_finite, without.loss, without.ablated) == (True, 6.0, ("bad",))
    assert run(terms, variant=NATIVE.only("good")).run.is_finite
    assert not run(terms, variant=NATIVE.only("bad")).run.is_finite


def test_weight_is_set_in_the_live_objective():
    """And is back afterwards; a weight of 0 leaves the term's backward in the graph."""
    weights = {"lam": 0.5}
    options = {"weights": weights, "reweight": weights.__setitem__}

    def built(m, x):
        return m(x).sum() + weights["lam"] * (m(x) - m(x)).sqrt().sum()

    def skipped(m, x):
        return built(m, x) if weights["lam"] else m(x).sum()

    done = run(skipped, variant=NATIVE.ablated("lam"), **options)
    assert (done.run.is_finite, done.weights) == (True, {"lam": 0.0})
    assert not run(built, variant=NATIVE.ablated("lam"), **options).run.is_finite
    assert weights == {"lam": 0.5}


def test_what_cannot_be_taken_out_is_refused():
    """Names without a term, everything at once, a weight that cannot be set."""
    with pytest.raises(UsageError, match="cannot ablate bad: the loss is one scalar"):
        run(lambda m, x: m(x).sum(), variant=NATIVE.ablated("bad"))
    with pytest.raises(UsageError, match="nothing is left of the loss; its terms: good, bad"):
        run(terms, variant=NATIVE.ablated("good", "bad"))
    with pytest.raises(UsageError, match="cannot set the weight 'lam'"):
        run(lambda m, x: m(x).sum(), variant=NATIVE.ablated("lam"), weights={"lam": 1.0})


def test_terms_are_ranked_by_one_backward_each():
    """A term is blamed for its value and for its gradients; one without a graph is not."""

    def loss_fn(m, x):
        return {**terms(m, x), "nan": (m(x).detach() - 9).sqrt().sum(), "zero": x.sum() * 0}

    subject = Subject(Scale(), [(ONES,)], loss_fn)
    blamed = blame_terms(subject, (ONES,), ["weight"])
    assert blamed == {"good": True, "bad": False, "nan": False, "zero": True}
    assert subject.model.weight.grad is None
    assert blame_terms(Subject(Scale(), [], lambda m, x: m(x).sum()), (ONES,), ["weight"]) == {}


def test_terms_are_ranked_in_the_step_that_failed():
    """With the numbers that this step draws, not with those of another."""

    def loss_fn(m, x):
        y, drawn = m(x), torch.rand(())
        return {"a": (y * (drawn - at_three)).square().sum().sqrt(), "b": y.sum()}

    torch.manual_seed(7 + 3)
    at_three = torch.rand(())
    subject = Subject(Scale(), [], loss_fn, seed=7)
    assert blame_terms(subject, (ONES,), ["weight"]) == {"a": True, "b": True}
    assert blame_terms(subject.at(3), (ONES,), ["weight"]) == {"a": False, "b": True}


def test_a_variant_that_raises_is_a_row():
    """The native step that raises is an error, a variant's is told."""

    def loss_fn(m, x):
        if x.dtype == torch.float64:
            raise TypeError("no doubles")
        return m(x).sum()

    done = run(loss_fn, variant=VARIANTS["fp64"])
    assert done.run.raised.startswith("TypeError: no doubles (test_replay.py:")
    assert (done.trace, done.run.is_finite) == (None, False)
    assert run(loss_fn).run.is_finite


# -- gradients -------------------------------------------------------------------------------------


def test_nonfinite_gradients_are_sinks():
    """With name, group, place and the op that left them; a finite gradient is none."""
    model = nn.ModuleDict({"a": Scale(1.0, 0.0), "b": Scale(1.0)})
    done = run(lambda m, x: m["a"](x[:2]).square().sqrt().sum() + m["b"](x[:1]).sum(), model=model)
    (sink,) = (s for s in done.trace.sinks if s.kind == "gradient")
    assert (sink.name, sink.group, sink.where) == ("a.weight", "a", (1,))
    assert sink.last
    assert [(g.name, g.nonfinite, g.parameters) for g in done.run.groups] == [
        ("a", 1, 1),
        ("b", 0, 1),
    ]
    assert math.isnan(done.run.groups[0].norm)


def test_parameters_without_a_gradient_are_counted():
    """An unread head gets none; a frozen one is not expected to."""
    model = nn.ModuleDict({"read": Scale(), "unread": Scale(), "frozen": Scale()})
    model["frozen"].weight.requires_grad_(False)
    done = run(lambda m, x: (m["read"](x) + m["frozen"](x)).sum(), model=model)
    assert [(g.name, g.parameters, g.without_gradient) for g in done.run.groups] == [
        ("read", 1, 0),
        ("unread", 1, 1),
    ]


def test_earlier_gradients_do_not_count():
    """A step begins with no gradient, as after `zero_grad`."""
    model = Scale()
    model.weight.grad = torch.full((3,), NAN)
    done = run(lambda m, x: m(x).sum(), model=model)
    assert done.run.is_finite
    assert torch.isnan(model.weight.grad).all()


def test_huge_norms_are_no_error():
    """Squares may leave the range of the dtype; the norm does not."""
    for dtype, size in ((torch.float32, 1e25), (torch.float64, 1e200)):
        model = nn.ModuleList([Scale(), Scale()]).to(dtype)
        done = run(
            lambda m, x, size=size: ((m[0](x) + m[1](x)) * size).sum(),
            (ONES.to(dtype),),
            model=model,
        )
        assert done.run.is_finite
        assert [g.norm for g in done.run.groups] == pytest.approx([math.sqrt(3) * size] * 2)


# -- loss scale ------------------------------------------------------------------------------------


def test_overflow_that_a_smaller_scale_cures():
    """Finite, with a note: GradScaler would skip, halve and go on."""
    done = run(lambda m, x: (m(x).half() * 0.5).float().mean(), variant=VARIANTS["amp-fp16"])
    assert (done.run.is_finite, done.run.scale, done.run.notes) == (True, INITIAL_SCALE, ())
    tight = run(lambda m, x: (m(x).half() * 100).float().sum(), variant=VARIANTS["amp-fp16"])
    assert tight.run.is_finite
    assert tight.run.scale == 512.0
    assert "gradients overflow at loss scale 65536; 512 fits" in tight.run.notes
    assert tight.run.groups[0].norm == pytest.approx(100 * math.sqrt(3))


def test_overflow_that_no_scale_cures():
    """Gradients that overflow at a scale of 1 are a failure."""
    done = run(
        lambda m, x: (m(x).half() * 300 * 300).float().sum(),
        variant=VARIANTS["amp-fp16"],
        model=Scale(1e-6, 1e-6, 1e-6),
    )
    assert math.isfinite(done.run.loss)
    assert (done.run.is_finite, done.run.nonfinite) == (False, 1)
    assert done.trace.nonfinite_sinks


@pytest.mark.parametrize(("enabled", "scale"), [(True, 1000.0), (False, None)])
def test_scale_of_the_subjects_own_scaler(enabled, scale):
    """The native step uses the scale that training would use, and reports unscaled norms."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0, enabled=enabled)
    done = run(lambda m, x: m(x).sum(), scaler=scaler)
    assert done.run.scale == scale
    assert done.run.groups[0].norm == pytest.approx(math.sqrt(3))
    assert scaler.get_scale() == (1000.0 if enabled else 1.0)


def test_optimizer_steps_with_unscaled_gradients():
    """A scale changes no parameter by a different amount."""
    stepped = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=4096.0)):
        model = Scale()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        optimizer.register_step_post_hook(
            lambda *_, model=model: stepped.append(model.weight.detach().clone())
        )
        run(lambda m, x: m(x).sum(), model=model, optimizer=optimizer, scaler=scaler)
    assert torch.equal(stepped[0], torch.tensor([0.0, 1.0, 2.0]))
    assert torch.equal(stepped[0], stepped[1])


# -- the optimizer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("eps", "finite"), [(0.0, False), (1e-8, True)])
def test_step_that_makes_a_parameter_nonfinite(eps, finite):
    """Adam without eps on an element that has no gradient."""
    model = Scale()
    optimizer = torch.optim.Adam(model.parameters(), eps=eps)
    done = run(lambda m, x: m(x).sum(), (torch.tensor([1.0, 0.0, 1.0]),), model=model,
               optimizer=optimizer)  # fmt: skip
    assert done.run.is_finite is finite
    assert done.run.stepped_nonfinite == (0 if finite else 1)
    assert [s.where for s in done.trace.sinks if s.kind == "stepped"] == ([] if finite else [(1,)])
    assert {e.phase for e in done.trace.events} == {"forward", "backward", "optimizer"}


def test_no_step_is_taken_with_nonfinite_gradients():
    """The optimizer comes after a finite backward only."""
    model = Scale()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    done = run(terms, model=model, optimizer=optimizer)
    assert "optimizer" not in {e.phase for e in done.trace.events}
    assert done.run.stepped_nonfinite == 0


def test_an_optimizer_that_wants_a_closure_is_left_alone():
    """With a note."""
    model = Scale()
    done = run(lambda m, x: m(x).sum(), model=model, optimizer=torch.optim.LBFGS([model.weight]))
    assert done.run.notes == ("the optimizer step needs a closure and was not replayed",)


# -- batches ---------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "x y")  # noqa: PYI024  what data loaders return


@dataclass
class Record:
    x: torch.Tensor
    y: torch.Tensor
    name: str = "first"


def spoil(m, x, y):
    """A loss that writes to its batch."""
    loss = (m(x.clone()) * y.clone()).sum()
    x.zero_()
    y.fill_(NAN)
    return loss


@pytest.mark.parametrize(
    ("make", "loss_fn", "name"),
    [
        (lambda x, y: (x, y), spoil, "batch[1]"),
        (lambda x, y: [x, y], lambda m, b: spoil(m, *b), "batch[1]"),
        (lambda x, y: {"x": x, "y": y}, lambda m, b: spoil(m, **b), "batch['y']"),
        (Pair, lambda m, b: spoil(m, b.x, b.y), "batch.y"),
        (Record, lambda m, b: spoil(m, b.x, b.y), "batch.y"),
        (lambda x, y: {"in": Pair(x, [y])}, lambda m, b: spoil(m, b["in"].x, b["in"].y[0]),
         "batch['in'].y[0]"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("variant", [NATIVE, VARIANTS["fp64"]])
def test_batches_of_any_shape_are_never_written_to(make, loss_fn, name, variant):
    """A tuple is splatted, all else is one argument; a non-finite tensor is named by its path."""
    x, y = torch.ones(3), torch.ones(3)
    for _ in range(2):
        assert run(loss_fn, make(x, y), variant).run.loss == 6.0
    assert torch.equal(x + y, torch.full((3,), 2.0))
    y[1] = NAN
    done = run(loss_fn, make(x, y), variant)
    assert [s.name for s in done.trace.state if s.kind == "batch"] == [name]


def test_a_single_tensor_is_one_argument():
    """Not splatted over its rows."""
    assert run(lambda m, x: m(x).sum(), ONES).run.loss == 6.0


# -- variants --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "dtype"), [(NATIVE, "float32"), (VARIANTS["fp64"], "float64")])
def test_ops_run_in_the_precision_of_the_variant(variant, dtype):
    """The trace shows what was really computed in."""
    done = run(lambda m, x: m(x).float().exp().sum(), variant=variant)
    (exp,) = (e for e in done.trace.events if e.op == "aten::exp")
    assert exp.dtype == dtype


def test_single_precision_replays_a_half_model():
    """FP32 is an upcast for a model in half."""
    model = Scale(300.0, 300.0).half()
    batch = (torch.full((2,), 300.0).half(),)
    assert not run(lambda m, x: m(x).sum(), batch, model=model).run.is_finite
    assert run(lambda m, x: m(x).sum(), batch, VARIANTS["fp32"], model=model).run.is_finite


def test_autocast_without_a_root_forward_is_told():
    """`-net` has no effect where the loss calls a part of the model."""
    model = nn.Sequential(nn.Linear(3, 3))
    variant = VARIANTS["amp-bf16-net"]
    assert run(lambda m, x: m(x).sum(), variant=variant, model=model).run.notes == ()
    (note,) = run(lambda m, x: m[0](x).sum(), variant=variant, model=model).run.notes
    assert note == "the root module was not called as a whole: autocast had no effect"


def test_emulated_half_is_told():
    """An FP16 product on a CPU is labelled."""
    model = nn.Linear(3, 3)
    done = run(lambda m, x: m(x).float().mean(), variant=VARIANTS["amp-fp16"], model=model)
    assert done.run.notes == ("fp16 (emulated accumulation)",)
    assert run(lambda m, x: m(x).sum(), model=model).run.notes == ()


# -- determinism -----------------------------------------------------------------------------------


def test_fingerprint_is_of_loss_and_gradients():
    """Equal for the same step, also with dropout; another bit anywhere changes it."""
    drop = nn.Dropout()
    noisy = lambda m, x: drop(m(x)).sum()
    first = run(noisy, (torch.ones(3),), seed=1)
    assert run(noisy, (torch.ones(3),), seed=1).fingerprint == first.fingerprint
    assert run(noisy, (torch.ones(3),), seed=2, scope=None).fingerprint != first.fingerprint
    shifted = run(lambda m, x: m(x).sum() + 1e-6)
    plain = run(lambda m, x: m(x).sum())
    gradient = run(lambda m, x: (m(x) * (1 + 2**-23) - m(x).detach() * 2**-23).sum())
    assert plain.run.loss == gradient.run.loss == 6.0
    assert len({shifted.fingerprint, plain.fingerprint, gradient.fingerprint}) == 3


def test_a_replay_inside_no_grad_is_a_step_all_the_same():
    """Whoever asks for a replay may stand where gradients are off."""
    with torch.no_grad():
        done = run(lambda m, x: m(x).sum())
        assert not torch.is_grad_enabled()
    assert done.run.is_finite


def test_variant_is_kept_with_the_replay():
    """So that a row of the report can say what it was."""
    done = run(lambda m, x: m(x).sum(), variant=VARIANTS["amp-bf16"])
    assert (done.variant, done.run.variant) == (
        Variant("amp-bf16", autocast="bfloat16"),
        "amp-bf16",
    )
    assert done.run.seconds > 0


def test_a_leaf_that_only_the_loss_holds_keeps_its_gradient():
    """A parameter captured by the loss, unknown to model and optimizer, is put back too."""
    outside = nn.Parameter(torch.ones(()))
    outside.grad = torch.full((), 7.0)
    batch = (torch.ones(3, 2),)
    replay(Subject(nn.Linear(2, 1), [batch], lambda m, x: (m(x) * outside).sum()), batch)
    assert outside.grad == 7.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fingerprints_take_one_nan_for_another(dtype):
    """The sign of a NaN depends on the order of the operands; that of a number does not."""
    model = nn.Linear(2, 1, bias=False).to(dtype)
    digests = []
    for row in ([NAN, 1.0], [-NAN, 1.0], [NAN, -1.0], [INF, 1.0]):
        model.weight.grad = torch.tensor([row], dtype=dtype)
        digests.append(fingerprint(torch.zeros(()), model))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
