"""Hunting: the right culprit, silence on its healthy twin, and what the report claims."""

import inspect
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nanhunt.errors import SubjectError, UsageError
from nanhunt.hunting import hunt
from nanhunt.subject import Subject

INF, NAN = math.inf, math.nan
X = torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 0.0]])


class Scale(nn.Module):
    """Multiplies by a weight, and carries a buffer that nothing reads."""

    def __init__(self, *values):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(values or (1.0, 1.0, 1.0)))
        self.register_buffer("unused", torch.full((2,), NAN))

    def forward(self, x):
        return self.weight * x


def find(loss_fn, batch=(X,), model=None, **options):
    """The report of a native hunt alone."""
    subject = Subject(model or Scale(), [batch], loss_fn, **options)
    return hunt(subject, precisions=("native",))


def culprit(report):
    """The parts of the finding that a user acts on."""
    assert report.verdict == "culprit"
    (found,) = report.culprits
    return found.phase, found.op, found.node, mark(found)


def mark(found):
    """The mark at the end of the line that was named."""
    assert found.file.endswith("test_hunting.py")
    line = inspect.getsource(inspect.getmodule(mark)).splitlines()[found.line - 1]
    return line.rpartition("# ")[2]


def is_silent(report):
    return (report.verdict, report.culprits) == ("healthy", ())


# -- faults and their healthy twins ----------------------------------------------------------------
# Each takes `safe`: the same program, cured.


def sqrt_at_zero(m, x, *, safe):
    y = m(x).pow(2).sum(0) * 0 + (1e-6 if safe else 0)
    return y.sqrt().sum()  # sqrt


def sqrt_above_pow(m, x, *, safe):
    y = m(x * 0).pow(2) + (1e-6 if safe else 0)
    return y.sqrt().mean()  # above pow


def log_of_negative(m, x, *, safe):
    return (m(x) + (1 if safe else -0.7)).log().mean()  # log


def masked_log(m, x, *, safe):
    y = m(x)
    inner = torch.where(y > 0, y, 1.0) if safe else y
    return torch.where(y > 0, inner.log(), 0.0).sum()  # masked


def repeated_eigenvalues(m, x, *, safe):
    a = m(x)
    covariance = a.t() @ a + (torch.diag(torch.arange(3.0)) if safe else 0)
    wide = torch.block_diag(covariance, torch.eye(2) * (torch.tensor([7.0, 9.0]) if safe else 1))
    _, vectors = torch.linalg.eigh(wide)  # eigh
    return vectors[:, 0].square().dot(torch.arange(5.0))


def values_only(m, x, *, safe):
    a = m(x)
    return torch.linalg.eigh(torch.block_diag(a.t() @ a, torch.eye(2)))[0].square().sum()


def fully_masked_softmax(m, x, *, safe):
    mask = torch.tensor([[True, False, True], [True, not safe, True]])
    scores = m(x).masked_fill(mask, -INF)
    return scores.softmax(-1).square().sum()  # softmax


def half_overflow(m, x, *, safe):
    y = m(x).half() * 300
    return (y * (30 if safe else 300)).float().mean()  # half


def micro_batches(m, x, *, safe):
    total = 0.0
    for part in x.split(1):
        y = m(part[:, 1])
        total = total + (y.square() + (1e-6 if safe else 0)).sqrt().sum() / 2  # micro
    return total


def steps_inside(m, x, *, safe):
    for part in x.split(1):
        y = m(part[:, 1])
        loss = (y.square() + (1e-6 if safe else 0)).sqrt().sum()  # inside
        if part[0, 0] == 1:
            loss.backward()
    return m(x).sum()


def gradient_penalty(m, x, *, safe):
    x = x.clone().requires_grad_()
    y = (m(x).square() + (1e-3 if safe else 0)).sqrt()  # penalty
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return slope.square().sum()


def curved_penalty(m, x, *, safe):
    x = x.clone().requires_grad_()
    y = (m(x) + (1e-3 if safe else 0)).pow(1.5)  # curved
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return slope.square().sum()


def transform(m, x, *, safe):
    def length(w):
        return ((w * x).square() + (1e-3 if safe else 0)).sqrt().sum()  # transform

    return torch.func.grad(length)(m.weight).sum() + m(x).sum()


def repaired_element(m, x, *, safe):
    out = torch.zeros(2)
    out[0] = m(x)[0, 1].detach().log()
    out[0] = 1.0
    out[1] = (m(x)[0, 0] - (0 if safe else 9)).sqrt()  # repaired
    return out.sum()


class SafeLog(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, safe):
        ctx.save_for_backward(x)
        ctx.safe = safe
        return (x + 1e-6).log()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / (x + 1e-6 if ctx.safe else x), None


def custom_function(m, x, *, safe):
    return SafeLog.apply(m(x), safe).sum()  # applied


def root(x):
    return (x * 2).sqrt() + 1  # root


def checkpointed(m, x, *, safe):
    return checkpoint(root, m(x) + (1 if safe else 0), use_reentrant=False).square().sum()


def checkpointed_reentrant(m, x, *, safe):
    return checkpoint(root, m(x) + (1 if safe else 0), use_reentrant=True).square().sum()


def in_place_on_a_view(m, x, *, safe):
    y = m(x) + (1 if safe else 0)
    y[:, 1:].sqrt_()  # in place
    return y.sum()


def gradient_hook(m, x, *, safe):
    y = m(x).exp()
    y.register_hook(lambda grad: grad / (x + 1 if safe else x))  # hook
    return y.sum()


def sum_of_gradients(m, x, *, safe):
    y = (m(x) / 4).half()
    one, two = y * 40_000, y * (20_000 if safe else 40_000)
    return (one.float().sum() + two.float().sum()) * 1.0


FAULTS = [
    (sqrt_at_zero, ("backward", "aten::sqrt", "SqrtBackward0", "sqrt")),
    (sqrt_above_pow, ("backward", "aten::sqrt", "SqrtBackward0", "above pow")),
    (log_of_negative, ("forward", "aten::log", None, "log")),
    (masked_log, ("backward", "aten::log", "LogBackward0", "masked")),
    (repeated_eigenvalues, ("backward", "aten::_linalg_eigh", "LinalgEighBackward0", "eigh")),
    (fully_masked_softmax, ("forward", "aten::_softmax", None, "softmax")),
    (half_overflow, ("forward", "aten::mul", None, "half")),
    (micro_batches, ("backward", "aten::sqrt", "SqrtBackward0", "micro")),
    (steps_inside, ("backward", "aten::sqrt", "SqrtBackward0", "inside")),
    (gradient_penalty, ("forward", "aten::sqrt", "SqrtBackward0", "penalty")),
    (curved_penalty, ("backward", "aten::pow", "PowBackward0", "curved")),
    (repaired_element, ("forward", "aten::sqrt", None, "repaired")),
    (custom_function, ("backward", "custom:SafeLog", "SafeLogBackward", "applied")),
    (checkpointed, ("backward", "aten::sqrt", "SqrtBackward0", "root")),
    (checkpointed_reentrant, ("backward", "aten::sqrt", "SqrtBackward0", "root")),
    (in_place_on_a_view, ("backward", "aten::sqrt_", "CopySlices", "in place")),
    (gradient_hook, ("backward", "aten::div", "ExpBackward0", "hook")),
]
NAMES = [fault.__name__ for fault, _ in FAULTS]


def with_decoys(fault):
    """The same loss among harmless non-finite values: a mask, a metric, masked norms."""

    def loss_fn(m, x, *, safe):
        scores = m(x).masked_fill(torch.eye(3)[:2].bool(), -INF)
        attention = scores.softmax(-1).sum()
        with torch.no_grad():
            metric = (m(x) - 5).log().mean()
            assert metric.isnan()
        norms = torch.linalg.norm(torch.cat([m(x), torch.zeros(2, 2)], 1) * 1.0, dim=0)
        return attention + norms[:3].sum() + fault(m, x, safe=safe)

    return loss_fn


@pytest.mark.parametrize(("fault", "expected"), FAULTS, ids=NAMES)
def test_culprit(fault, expected):
    """Phase, op, node and line; the cured twin is healthy."""
    assert culprit(find(lambda m, x: fault(m, x, safe=False))) == expected
    assert is_silent(find(lambda m, x: fault(m, x, safe=True)))


@pytest.mark.parametrize(("fault", "expected"), FAULTS, ids=NAMES)
def test_culprit_among_decoys(fault, expected):
    """An intended mask, a NaN metric, an unused NaN buffer and masked norms mislead nobody."""
    loss_fn = with_decoys(fault)
    assert culprit(find(lambda m, x: loss_fn(m, x, safe=False))) == expected
    assert is_silent(find(lambda m, x: loss_fn(m, x, safe=True)))


def test_values_of_a_decomposition_are_no_fault():
    """Repeated eigenvalues are harmless where no vector is used."""
    assert is_silent(find(lambda m, x: values_only(m, x, safe=False)))


def test_a_gradient_transform():
    """`torch.func.grad` in the loss: its tensors have no memory of their own to be read.

    The loss itself is not finite, so the backward that it ran is part of the forward.
    """
    phase, _, node, line = culprit(find(lambda m, x: transform(m, x, safe=False)))
    assert (phase, node, line) == ("forward", "SqrtBackward0", "transform")
    assert is_silent(find(lambda m, x: transform(m, x, safe=True)))


def test_sum_of_the_engine():
    """Two finite half gradients whose sum at the fan-out is not."""
    report = find(lambda m, x: sum_of_gradients(m, x, safe=False))
    (found,) = report.culprits
    assert (found.phase, found.op, found.dtype) == ("backward", "aten::add", "float16")
    assert found.cause == "gradient_accumulation_overflow"
    assert is_silent(find(lambda m, x: sum_of_gradients(m, x, safe=True)))


def test_evidence_of_repeated_eigenvalues():
    """The ties that the recorded call returned."""
    (found,) = find(lambda m, x: repeated_eigenvalues(m, x, safe=False)).culprits
    assert found.cause == "degenerate_decomposition"
    assert found.evidence[0].startswith("1 of 1 matrices: bit-identical values among the 5")


# -- where it is -----------------------------------------------------------------------------------


class Tower(nn.Module):
    """A frozen stem, a shared block and a head with the fault."""

    def __init__(self, *, safe):
        super().__init__()
        self.stem, self.block, self.head = Scale(), Scale(), Scale()
        self.stem.weight.requires_grad_(False)
        self.again = self.block
        self.safe = safe

    def forward(self, x):
        y = self.again(self.block(self.stem(x)))
        return self.head(y + 1 if self.safe else y).sqrt()  # head


def test_module_groups_and_shared_parameters():
    """The poisoned groups, counted once for a shared block; nothing of the frozen part."""
    report = find(
        lambda m, x: {"fit": m(x).sum(), "size": m.block(x).square().sum()},
        model=Tower(safe=False),
    )
    assert culprit(report) == ("backward", "aten::sqrt", "SqrtBackward0", "head")
    (found,) = report.culprits
    assert found.poisoned == (("block", 1, 1), ("head", 1, 1))
    assert (found.terms, found.term) == (("fit",), "fit")
    assert is_silent(find(lambda m, x: m(x).sum(), model=Tower(safe=True)))


def test_module_of_the_culprit():
    """The path of the innermost module of the model that was running."""

    class Root(nn.Module):
        def forward(self, x):
            return x.sqrt()  # inner

    model = nn.Sequential(Scale(), nn.Sequential(nn.Identity(), Root()))
    (found,) = find(lambda m, x: m(x).sum(), model=model).culprits
    assert (found.module, mark(found)) == ("1.1", "inner")


def test_two_independent_faults_are_both_named():
    """In the order of time of the phase that failed; a replay with both repaired tells it."""

    def loss_fn(m, x):
        y = m(x)
        a = (y * 0).sqrt()  # earlier in the forward
        b = (y * 0).sqrt()  # earlier in the backward
        return (a + b).sum()

    report = find(loss_fn)
    assert [mark(found) for found in report.culprits] == [
        "earlier in the backward",
        "earlier in the forward",
    ]
    assert report.notes[0].startswith("2 births are independent: repairing all of them at birth ")


def test_an_infinity_that_was_asked_for_comes_last():
    """Where both reach the loss, the op that made a value is named before one that was told to."""

    def loss_fn(m, x):
        asked = m(x).masked_fill(x == 0, -INF).sum()
        return asked + (m(x) - 9).log().sum()  # made

    assert culprit(find(loss_fn))[1:] == ("aten::log", None, "made")
    alone = find(lambda m, x: m(x).masked_fill(x == 0, -INF).sum())  # told
    assert mark(alone.culprits[0]) == "told"


# -- data ------------------------------------------------------------------------------------------


def poison(model, kind):
    with torch.no_grad():
        (model.weight if kind == "parameter" else model.norm)[1] = NAN


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_state_that_was_nonfinite_before(kind):
    """A parameter or a buffer that is read is the culprit, by name; an unread one is not."""
    model = Scale()
    model.register_buffer("norm", torch.ones(3))
    assert is_silent(find(lambda m, x: (m(x) * m.norm).sum(), model=model))
    poison(model, kind)
    report = find(lambda m, x: (m(x) * m.norm).sum(), model=model)
    (found,) = report.culprits
    assert (report.verdict, found.phase, found.op, found.cause) == (
        "culprit", "data", kind, "bad_data"
    )  # fmt: skip
    name = "weight" if kind == "parameter" else "norm"
    assert found.evidence == (f"{name} [3] holds 1 NaN before the step, first at index [1]",)
    assert is_silent(find(lambda m, x: m.weight[:1].sum() * m.norm[0] * x.sum(), model=model))


def test_batch_that_was_nonfinite_before():
    """Which tensor of the batch, and where; NaN labels that are dropped are healthy."""
    y = torch.tensor([1.0, NAN])
    report = find(lambda m, x, y: (m(x).sum(1) - y).square().mean(), (X, y))
    (found,) = report.culprits
    assert (found.phase, found.op) == ("data", "input")
    assert found.evidence == ("batch[1] [2] holds 1 NaN before the step, first at index [1]",)

    def dropping(m, x, y):
        keep = ~y.isnan()
        return (m(x).sum(1)[keep] - y[keep]).square().mean()

    assert is_silent(find(dropping, (X, y)))


# -- the optimizer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_optimizer_step(eps):
    """Adam without eps divides 0 by 0 where nothing was ever learnt."""
    model = Scale()
    optimizer = torch.optim.Adam(model.parameters(), eps=eps)
    report = find(lambda m, x: m(x).sum(), (X * torch.tensor([1.0, 0.0, 1.0]),), model=model,
                  optimizer=optimizer)  # fmt: skip
    if eps:
        assert is_silent(report)
        return
    (found,) = report.culprits
    assert (found.phase, found.op) == ("optimizer", "aten::addcdiv_")
    assert found.cause == "optimizer_arithmetic"
    assert report.headline.startswith("loss and gradients are finite; after the optimizer step 1")


# -- weights, terms and cures ----------------------------------------------------------------------


class Objective:
    """The incident's story: two weights of similar names, one of them live."""

    def __init__(self, *, builds_anyway):
        self.weights = {"lam_fit": 1.0, "lam_gap": 0.012, "lam_align": 0.002}
        self.weights["lam_subspace_align"] = 0.0
        self.builds_anyway = builds_anyway

    def __call__(self, model, x):
        y = model(x)
        covariance = torch.block_diag(y.t() @ y, torch.eye(2))
        values, vectors = torch.linalg.eigh(covariance)  # decomposition
        terms = {
            "fit": lambda: (y.sum(1) - 1).square().mean(),
            "gap": lambda: torch.relu(1 - values[-1] + values[-2]),
            "align": lambda: vectors[:, 1].square().dot(torch.arange(5.0)),
            "subspace_align": lambda: vectors[:, 0].square().sum(),
        }
        weighted = ((name, self.weights[f"lam_{name}"], term) for name, term in terms.items())
        return {name: w * term() for name, w, term in weighted if w or self.builds_anyway}


def incident(*, builds_anyway=False, **options):
    objective = Objective(builds_anyway=builds_anyway)
    subject = Subject(
        Scale(),
        [(X,)],
        objective,
        weights=objective.weights,
        reweight=objective.weights.__setitem__,
    )
    return hunt(subject, precisions=("native",), **options), objective


def test_the_cure_is_found_and_confirmed():
    """Without `lam_gap` the step fails still; without `lam_align`, found unasked, it is finite."""
    report, objective = incident(ablate=["lam_gap"])
    assert culprit(report) == (
        "backward", "aten::_linalg_eigh", "LinalgEighBackward0", "decomposition"
    )  # fmt: skip
    asked, cure = (a for a in report.ablations if a.mode == "without")
    assert (asked.names, asked.requested, asked.took_effect) == (("lam_gap",), True, True)
    assert (asked.cures, asked.weight_before, asked.weight_after) == (False, 0.012, 0.0)
    assert asked.ops_after == (0, 0)
    assert (cure.names, cure.requested, cure.cures) == (("lam_align",), False, True)
    assert cure.took_effect
    alone = {a.names: a.finite for a in report.ablations if a.mode == "alone"}
    assert alone == {("gap",): True, ("align",): False}
    assert objective.weights["lam_gap"] == 0.012
    assert report.twins == (("lam_align", "lam_subspace_align"),)
    values = [note for note in report.notes if "vectors used" in note]
    assert len(values) == 1


def test_an_ablation_that_does_not_ablate():
    """A weight of 0 whose term is built all the same leaves its operations in the graph."""
    report, _ = incident(builds_anyway=True, ablate=["lam_align"])
    asked = report.ablations[0]
    assert (asked.cures, asked.took_effect, asked.weight_after) == (False, False, 0.0)
    assert asked.ops_after[1] > 0


def test_a_weight_that_is_0_already():
    """Setting it to 0 proves nothing."""
    report, _ = incident(ablate=["lam_subspace_align"])
    asked = report.ablations[0]
    assert (asked.weight_before, asked.took_effect, asked.cures) == (0.0, False, False)
    assert any(a.cures and a.names == ("lam_align",) for a in report.ablations)


def test_every_term_can_be_tried():
    """`all` takes each out, by its weight where the name shows one."""
    report, _ = incident(ablate=["all"])
    tried = {a.names[0]: a.finite for a in report.ablations if a.mode == "without"}
    assert tried == {"lam_fit": False, "lam_gap": False, "lam_align": True}


def test_terms_that_fail_together():
    """Two half gradients that overflow in sum accuse no term by itself."""

    def loss_fn(m, x):
        y = (m(x) / 4).half()
        return {"a": (y * 40_000).float().sum(), "b": (y * 40_000).float().sum()}

    report = find(loss_fn)
    assert report.verdict == "culprit"
    assert "every term alone has a finite backward: the terms fail together" in report.notes
    assert not any(a.cures for a in report.ablations)


def test_a_term_with_a_nonfinite_value_is_accused():
    """A NaN loss has no gradients to look at; its terms have values."""

    def loss_fn(m, x):
        y = m(x)
        return {"good": y.sum(), "bad": (y - 9).log().sum()}

    report = find(loss_fn)
    assert [a.names for a in report.ablations if a.cures] == [("bad",)]
    assert report.culprits[0].terms == ("bad",)


def test_unknown_names_are_refused():
    """With the known ones; without any, in words."""
    with pytest.raises(UsageError) as caught:
        incident(ablate=["lam_aling"])
    assert str(caught.value) == (
        "nothing to ablate is called 'lam_aling'; known weights and terms: lam_fit, lam_gap, "
        "lam_align, lam_subspace_align, fit, gap, align"
    )
    with pytest.raises(UsageError, match="the loss is one scalar without named terms"):
        hunt((Scale(), (X,), lambda m, x: m(x).sum()), ablate=["all"])
    with pytest.raises(UsageError, match="no precision is called 'fp7'"):
        hunt((Scale(), (X,), lambda m, x: m(x).sum()), precisions=["fp7"])


def test_a_gradient_from_before_is_data():
    """A step of the subject's own that does not zero adds to what an earlier one has left."""
    model = Scale()
    model.weight.grad = torch.full((3,), NAN)

    def step(m, batch, loss_fn, _optimizer, _scaler, _step):
        loss = loss_fn(m, *batch)
        yield "loss", loss
        loss.backward()
        yield "grads", loss

    (found,) = find(lambda m, x: m(x).sum(), model=model, train_step=step).culprits
    assert (found.phase, found.op, found.where) == ("data", "gradient", "weight.grad")
    assert found.evidence == (
        "weight.grad [3] holds 3 NaN before the backward, first at index [0]",
    )
    assert find(lambda m, x: m(x).sum(), model=model).verdict == "healthy"


@pytest.mark.parametrize(
    ("others", "error", "sentence"),
    [
        (3, UsageError, r"others are subjects, as in \[make\(seed=1\), make\(seed=2\)\]; got 3"),
        ([3], SubjectError, r"a subject is a tuple \(model, batch, loss_fn\) or .*; got an object"),
        ((_ for _ in [Scale()]), SubjectError, "got an object of type Scale"),
    ],
)
def test_others_that_are_no_subjects_are_refused(others, error, sentence):
    """Before anything is replayed, where they are there by then."""
    with pytest.raises(error, match=sentence):
        hunt((Scale(), (X,), lambda m, x: m(x).log().sum()), precisions=(), others=others)


def test_others_may_be_tuples():
    """In any shape that a subject may have."""
    one = (Scale(), (X,), lambda m, x: m(x).log().sum())
    asked = [a.answer for a in hunt(one, precisions=(), others=[one]).diagnosis]
    assert asked[-1] == "yes"


def test_a_sparse_batch_is_replayed_in_parts():
    """A batch of which some tensor is sparse fails with fewer samples too."""
    adjacency = torch.eye(4).to_sparse()

    def loss_fn(m, adj, x):
        return (torch.sparse.mm(adj, x) * m.weight).log().sum()

    report = find(loss_fn, (adjacency, torch.zeros(4, 3)))
    assert report.culprits[0].op == "aten::log"
    sizes = next(a for a in report.diagnosis if a.question == "other_sizes")
    assert sizes.answer == "cannot tell" or "B = 1" in sizes.evidence


# -- verdicts --------------------------------------------------------------------------------------


def test_at_risk_in_another_precision():
    """Finite as given; another precision is not."""
    loss_fn = lambda m, x: (m(x) * (600 if x.dtype == torch.float32 else INF)).mean()
    assert hunt((Scale(), (X,), loss_fn), precisions=("native",)).verdict == "healthy"
    report = hunt((Scale(), (X,), loss_fn), precisions=("native", "fp64"))
    assert (report.verdict, report.culprits) == ("at_risk", ())
    assert [run.is_finite for run in report.runs] == [True, False]


def test_precision_cures_an_overflow_of_half():
    """FP32 is finite; FP64 fails for a degeneracy, and in FP64 indeed."""
    report = hunt(
        (Scale().half(), (X.half(),), lambda m, x: (m(x) * 300 * 300).float().sum()),
        precisions=("native", "fp64", "fp32"),
    )
    assert report.precision == "a fault of range or rounding in half precision: gone in fp32"
    report = hunt(
        (Scale(), (X,), lambda m, x: repeated_eigenvalues(m, x.float(), safe=False)),
        precisions=("native", "fp64"),
    )
    assert report.precision.startswith("not a precision fault: ")
    assert [run.culprit_dtype for run in report.runs] == ["float32", "float64"]


def test_unexplained_is_not_healthy():
    """A value that no recorded op made is admitted to be unexplained or laid at data's door."""

    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            grad.numpy()[...] = NAN
            return grad * 1

    report = find(lambda m, x: Hidden.apply(m(x)).sum())
    assert report.verdict in ("unexplained", "culprit")
    assert report.headline == "the loss is finite (4.5); 1 of 1 gradients are not"
    assert not any(f.phase == "forward" for f in report.culprits)


def test_silent_terms_and_missing_gradients_are_noted():
    """A term that is 0 without a graph; a head that nothing reads."""
    model = nn.ModuleDict({"read": Scale(), "unread": Scale()})
    report = find(lambda m, x: {"a": m["read"](x).sum(), "b": 0.0}, model=model)
    assert report.verdict == "healthy"
    assert report.notes == (
        "term b is exactly 0 and has no graph",
        "1 trainable parameters get no gradient from this loss",
    )


def test_a_step_that_is_not_deterministic_is_told():
    """What follows may not come again."""
    calls = iter(range(100))
    report = find(lambda m, x: m(x).sum() + next(calls))
    assert report.deterministic is False
    assert report.notes[0].startswith("two native replays differ (loss ")
    drop = nn.Dropout()
    assert find(lambda m, x: drop(m(x)).sum()).deterministic


def test_a_step_that_raises_is_an_error():
    """In one sentence with the line."""
    with pytest.raises(SubjectError, match=r"the step raised RuntimeError: .*test_hunting.py:"):
        hunt((Scale(), (X,), lambda m, x: (m(x) @ x).sum()))
    with pytest.raises(SubjectError, match="batch 1 is out of range: the subject has 1"):
        hunt((Scale(), (X,), lambda m, x: m(x).sum()), batch=1)


# -- what is left behind ---------------------------------------------------------------------------


def test_batch_that_asks_for_a_gradient():
    """A physics loss differentiates by its input, which may come as such in the batch."""

    def loss_fn(m, x):
        (slope,) = torch.autograd.grad(m(x).square().sum(), x, create_graph=True)
        return slope.square().sum()

    assert is_silent(find(loss_fn, (X.clone().requires_grad_(),)))


def test_a_whole_hunt_leaves_the_subject_as_it_was():
    """To the bit, random state and weights included; a second hunt finds the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.3), nn.Linear(3, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    weights = {"lam": 1.0}

    def loss_fn(m, x):
        y = m(x)
        terms = {"fit": y.sum()}
        if weights["lam"]:
            terms["lam"] = weights["lam"] * (y - y).sqrt().sum()
        return terms

    subject = Subject(
        model, [(torch.randn(4, 3),)], loss_fn, optimizer=optimizer, weights=weights,
        reweight=weights.__setitem__,
    )  # fmt: skip

    def tensors():
        state = (v for values in optimizer.state.values() for v in values.values())
        found = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
        return [*found, *state, subject.batches[0][0], torch.get_rng_state()]

    before = [(t, t.detach().clone()) for t in tensors()]
    reports = [hunt(subject, ablate=["lam"]) for _ in range(2)]
    for (tensor, bits), now in zip(before[:-1], tensors()[:-1], strict=True):
        assert now is tensor
        assert torch.equal(now, bits)
    assert torch.equal(before[-1][1], torch.get_rng_state())
    assert weights == {"lam": 1.0}
    first, second = reports
    assert first.verdict == "culprit"
    assert first.culprits == second.culprits
    assert [r.culprit for r in first.runs] == [r.culprit for r in second.runs]
    assert any(a.cures for a in first.ablations)


# -- one storage, many writers ---------------------------------------------------------------------


def test_columns_of_one_table_are_told_apart():
    """A NaN in a column that nobody reads is not blamed for one in another column."""

    def loss_fn(m, x):
        y, table = m(x), torch.zeros(2, 3)
        table[:, 0] = (y[:, 0] - 9).sqrt()
        table[:, 2] = (y[:, 1] - 9).log()  # read column
        return table[:, 2].sum()

    assert culprit(find(loss_fn)) == ("forward", "aten::log", None, "read column")


@pytest.mark.parametrize("write", [torch.Tensor.copy_, lambda to, y: torch.mul(y, 1, out=to)])
def test_what_was_overwritten_is_not_blamed(write):
    """A NaN that another one replaced reaches nothing."""

    def loss_fn(m, x):
        y, memory = m(x), torch.zeros(2, 3)
        with torch.no_grad():
            write(memory, (y - 9).sqrt())
            write(memory, (y - 8).log())  # replaces it
        return (y * memory).sum()

    assert culprit(find(loss_fn)) == ("forward", "aten::log", None, "replaces it")


class Double(torch.autograd.Function):
    """A Function of the user's that is not at fault."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


@pytest.mark.parametrize("of_module", [True, False])
def test_hook_on_the_node_of_a_function(of_module):
    """What a hook does is not laid at the door of the Function whose node it hangs on."""

    def hook(*given):
        return (given[-1][0].sub(9).log(),) if of_module else given[-1].sub(9).log()  # in the hook

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    if of_module:
        model[1].register_full_backward_hook(hook)

    def loss_fn(m, x):
        y = Double.apply(m(x))
        if not of_module:
            y.register_hook(hook)
        return y.sum()

    phase, op, _, where = culprit(find(loss_fn, model=model))
    assert (phase, op, where) == ("backward", "aten::log", "in the hook")


def test_module_called_under_a_transform():
    """What a module returns inside `torch.func.vmap` is measured below the wrapper."""

    def loss_fn(m, x):
        return torch.func.vmap(lambda row: (m(row) - 9).log())(x).sum()  # in vmap

    assert culprit(find(loss_fn)) == ("forward", "aten::log", None, "in vmap")


def test_optimizer_state_that_was_nan():
    """The state that the optimizer kept is to blame, not the step that reads it."""
    model = Scale()
    optimizer = torch.optim.Adam(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    optimizer.state[model.weight]["exp_avg"][0] = NAN
    (found,) = find(lambda m, x: m(x).sum(), model=model, optimizer=optimizer).culprits
    assert (found.phase, found.op) == ("data", "optimizer state")


@pytest.mark.filterwarnings("error")
def test_compiled_module_raises_no_warning():
    """No replay lets the compiler see a mode of ours, nor warn of a hook of ours."""
    model = nn.Sequential(nn.Linear(3, 3), torch.compile(nn.Sigmoid(), backend="eager"))
    assert is_silent(find(lambda m, x: m(x).sum(), model=model))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own
def test_forward_mode_derivatives_are_survived():
    """The zeros of forward mode have no memory; looking at them must not end the process."""
    model, x = nn.Linear(3, 2), torch.randn(3)

    def loss(m, z):
        return torch.func.hessian(lambda p: m(p).square().sum())(z).sum()

    assert hunt((model, (x,), loss), precisions=("native",)).verdict == "healthy"
