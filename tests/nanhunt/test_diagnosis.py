"""Each question of the diagnosis on a planted fault and on its healthy twin."""

import pytest
import torch
from torch import nn

from nanhunt.analysis.diagnosis import QUESTIONS
from nanhunt.hunting import hunt
from nanhunt.subject import Subject

X = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.25], [2.0, 2.0]])


class Model(nn.Module):
    """A linear layer, a buffer, and what the test puts between them and the output."""

    def __init__(self, act=lambda h: h):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 2)
        self.register_buffer("offset", torch.zeros(2))
        self.act = act

    def forward(self, x):
        return self.act(self.layer(x) + self.offset)


def mean_square(model, x):
    return model(x).square().mean()


def rooted(model, x):
    """A backward that fails: the square root of a sum that is 0 in the first sample."""
    h = model(x) * torch.tensor([[0.0], [1.0], [1.0], [1.0]])
    return h.square().sum(-1).sqrt().mean()


def safely_rooted(model, x):
    return (model(x).square().sum(-1) + 1e-6).sqrt().mean()


def answer(question, subject, **options):
    """The answer to one question about one subject."""
    options.setdefault("precisions", ("native",))
    report = hunt(subject, **options)
    return next(a for a in report.diagnosis if a.question == question)


def weighted(weights, *, configured=None, build=None):
    """A subject of two terms, `fit` and `root`, under weights that can be set."""

    def loss(model, x):
        z = model(x)
        terms = {"fit": lambda: z.square().mean(), "root": lambda: rooted(model, x)}
        return {
            name: weights[f"w_{name}"] * (build or terms)[name]()
            for name in terms
            if weights[f"w_{name}"]
        }

    return Subject(
        Model(),
        [(X,)],
        loss,
        weights=lambda: weights,
        configured=configured or {},
        reweight=weights.__setitem__,
    )


def test_every_question_is_asked_of_every_step():
    """A healthy step and a failing one answer the same questions in the same order."""
    slugs = [slug for slug, _, _ in QUESTIONS]
    for loss in (mean_square, rooted):
        report = hunt((Model(), (X,), loss), precisions=("native",))
        assert [a.question for a in report.diagnosis] == slugs
        assert all(a.evidence for a in report.diagnosis)


@pytest.mark.parametrize(("value", "expected"), [(torch.nan, "no"), (1.0, "yes")])
def test_inputs(value, expected):
    """A NaN in the batch is named with its tensor."""
    x = X.clone()
    x[1, 0] = value
    found = answer("inputs_finite", (Model(), (x,), mean_square))
    assert found.answer == expected
    assert ("batch[0]: 1 of 8" in found.evidence) == (expected == "no")


@pytest.mark.parametrize(("value", "expected"), [(torch.inf, "no"), (1.0, "yes")])
def test_state(value, expected):
    """A non-finite buffer is named."""
    model = Model()
    model.offset[1] = value
    found = answer("state_finite", (model, (X,), mean_square))
    assert found.answer == expected
    assert ("offset: 1 of 2" in found.evidence) == (expected == "no")


@pytest.mark.parametrize(("act", "expected"), [(lambda h: (h - 50).log(), "no"), (abs, "yes")])
def test_output(act, expected):
    """The root module's own output is looked at."""
    assert answer("output_finite", (Model(act), (X,), mean_square)).answer == expected


def test_output_that_nobody_asked_for():
    """A loss that calls only a part of the model leaves the question open."""
    found = answer("output_finite", (Model(), (X,), lambda m, x: m.layer(x).mean()))
    assert found.answer == "cannot tell"


@pytest.mark.parametrize(("factor", "expected"), [(torch.nan, "no"), (1.0, "yes")])
def test_terms(factor, expected):
    """A non-finite term is named with its value."""
    loss = lambda m, x: {"fit": m(x).square().mean(), "extra": m(x).mean() * factor}
    found = answer("terms_finite", (Model(), (X,), loss))
    assert found.answer == expected
    assert ("extra = nan" in found.evidence) == (expected == "no")


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float16, "yes"), (torch.float32, "no")])
def test_half_precision_in_the_loss(dtype, expected):
    """Loss ops and labels in half precision are counted by dtype."""
    loss = lambda m, x, y: (m(x).to(dtype) - y).float().square().mean()
    found = answer("loss_in_half", (Model(), (X, torch.zeros(4, 2, dtype=dtype)), loss))
    assert found.answer == expected
    assert ("batch[1] is float16" in found.evidence) == (expected == "yes")


def test_gone_in_wider_precisions():
    """An FP16 overflow is gone in FP32; a root at 0 stays in FP64; a finite step cannot tell."""
    half = (Model(), (X,), lambda m, x: (m(x).half() * 60000).float().mean() / 1e4)
    wide = {"precisions": ("native", "fp32", "fp64")}
    assert answer("gone_in_fp32", half, **wide).answer == "yes"
    stays = answer("gone_in_fp64", (Model(), (X,), rooted), **wide)
    assert (stays.answer, "float64" in stays.evidence) == ("no", True)
    healthy = answer("gone_in_fp64", (Model(), (X,), mean_square), **wide)
    assert healthy.answer == "cannot tell"
    assert answer("gone_in_fp64", (Model(), (X,), rooted)).answer == "cannot tell"


def test_wider_precisions_of_what_was_there_before():
    """A batch that holds NaN fails in each; a buffer that the step before left is not replayed."""
    given = answer("gone_in_fp64", (Model(), (X * torch.nan,), mean_square), precisions=("fp64",))
    assert (given.answer, given.evidence) == (
        "no",
        "that replay begins with a value that is non-finite",
    )

    def spoiling(model, x):
        value = model(x).square().mean()
        with torch.no_grad():
            model.offset.copy_((x - x.amax()).log()[0])
        return value

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    subject = Subject(model, [X], spoiling, optimizer=optimizer)
    report = hunt(subject, precisions=("fp64",), steps=2)
    assert (report.culprits[0].op, report.culprits[0].step) == ("aten::log", 0)
    asked = next(a for a in report.diagnosis if a.question == "gone_in_fp64")
    assert asked.answer == "cannot tell"
    assert asked.evidence == "that replay begins with a value that is non-finite"
    assert report.precision == (
        "fp64 cannot tell: its replay begins with a value that is non-finite"
    )


def test_gone_without_a_term():
    """The guilty term cures, an innocent one does not."""
    guilty = answer("gone_without", weighted({"w_fit": 1.0, "w_root": 0.1}), ablate=["w_root"])
    assert guilty.answer == "yes"
    alone = {"fit": lambda: torch.zeros((), requires_grad=True), "root": lambda: torch.zeros(())}
    healthy = weighted({"w_fit": 1.0, "w_root": 0.1}, build=alone)
    assert answer("gone_without", healthy).answer == "cannot tell"


@pytest.mark.parametrize(("loss", "expected"), [(rooted, "yes"), (mean_square, "cannot tell")])
def test_edge(loss, expected):
    """The zero divisor at the culprit is seen; where nothing was born nothing can be."""
    assert answer("edge_nearby", (Model(), (X,), loss)).answer == expected


def test_no_edge():
    """An overflow has no zero, tie or edge among its operands."""
    loss = lambda m, x: (m(x) * 0 + 1e30).square().mean()
    assert answer("edge_nearby", (Model(), (X,), loss)).answer == "no"


@pytest.mark.parametrize(("value", "expected"), [(0.0, "yes"), (1.0, "no")])
def test_silent_term(value, expected):
    """A term that is exactly 0 without a graph is named."""
    loss = lambda m, x: {"fit": m(x).square().mean(), "quiet": torch.tensor(value)}
    found = answer("silent_term", (Model(), (X,), loss))
    assert found.answer == expected
    assert ("quiet" in found.evidence) == (expected == "yes")


@pytest.mark.parametrize(("configured", "expected"), [(0.0, "yes"), (0.1, "no"), (None, None)])
def test_weight_differs(configured, expected):
    """The configured weight and the live one are compared where both are known."""
    given = {} if configured is None else {"w_root": configured}
    found = answer("weight_differs", weighted({"w_fit": 1.0, "w_root": 0.1}, configured=given))
    assert found.answer == (expected or "cannot tell")


def test_near_twins():
    """Only names of which one holds all words of the other are twins."""
    twins = {"lam_root": 0.1, "lam_root_off": 0.0}
    loss = lambda m, x: {"root": twins["lam_root"] * rooted(m, x), "fit": mean_square(m, x)}
    subject = Subject(Model(), [(X,)], loss, weights=twins, reweight=twins.__setitem__)
    assert answer("near_twins", subject, ablate=["lam_root"]).answer == "yes"
    assert answer("near_twins", weighted({"w_fit": 1.0, "w_root": 0.1})).answer == "no"
    assert answer("near_twins", (Model(), (X,), rooted)).answer == "cannot tell"


@pytest.mark.parametrize(("use", "expected"), [(False, "yes"), (True, "no")])
def test_parameter_without_gradient(use, expected):
    """A parameter that the loss does not read is named."""
    model = Model()
    model.spare = nn.Parameter(torch.ones(()))
    loss = lambda m, x: m(x).square().mean() * (m.spare if use else 1.0)
    found = answer("without_gradient", (model, (X,), loss))
    assert found.answer == expected
    assert ("spare" in found.evidence) == (expected == "yes")


@pytest.mark.parametrize(("clean", "expected"), [(True, "yes"), (False, "no")])
def test_sanitised(clean, expected):
    """A hook that replaces NaN gradients by 0 before anybody looks is found."""
    model = Model()
    if clean:
        model.layer.weight.register_hook(torch.nan_to_num)
        model.layer.bias.register_hook(torch.nan_to_num)
    assert answer("sanitised", (model, (X,), rooted)).answer == expected


@pytest.mark.parametrize(("fill", "expected"), [(-torch.inf, "yes"), (-1e4, "no")])
def test_asked_infinity(fill, expected):
    """An intended -inf mask is told from a finite one."""
    keep = torch.tensor([True, False])
    loss = lambda m, x: m(x).masked_fill(~keep, fill).softmax(-1).square().mean()
    assert answer("asked_infinity", (Model(), (X,), loss)).answer == expected


def test_scale():
    """A step that only a smaller loss scale fits, one that none fits, and no scale at all."""
    scaled = {"precisions": ("native", "amp-fp16")}
    steep = (Model(), (X,), lambda m, x: (m(x).half() * 8).float().mean())
    assert answer("scale_fits", steep, **scaled).answer == "yes"
    assert answer("scale_fits", (Model(), (X,), rooted), **scaled).answer == "no"
    assert answer("scale_fits", (Model(), (X,), mean_square)).answer == "cannot tell"


def test_deterministic():
    """A step that counts its calls is not; one that draws from torch's generator is."""
    calls = []

    def drifting(model, x):
        calls.append(None)
        return model(x).square().mean() * len(calls)

    assert answer("deterministic", (Model(), (X,), drifting)).answer == "no"
    drawn = lambda m, x: nn.functional.dropout(m(x), 0.5).square().mean()
    assert answer("deterministic", (Model(), (X,), drawn)).answer == "yes"


def test_batch_sizes():
    """A fault of every sample is there at every size; one of the last sample is not."""
    always = lambda m, x: (m(x) * 0).sqrt().mean()
    assert answer("other_sizes", (Model(), (X,), always)).answer == "yes"
    x = X.clone()
    x[3] = torch.nan
    assert answer("other_sizes", (Model(), (x,), mean_square)).answer == "no"
    assert answer("other_sizes", (Model(), (X,), mean_square)).answer == "cannot tell"


def test_seeds():
    """Other initialisations are replayed where they are given."""
    others = [Subject(Model(), [(X,)], rooted, seed=seed) for seed in (1, 2)]
    found = answer("other_seeds", (Model(), (X,), rooted), others=others)
    assert (found.answer, found.evidence) == ("yes", "seed 1 non-finite, 2 non-finite")
    healthy = [Subject(Model(), [(X,)], safely_rooted, seed=1)]
    assert answer("other_seeds", (Model(), (X,), rooted), others=healthy).answer == "no"
    assert answer("other_seeds", (Model(), (X,), rooted)).answer == "cannot tell"
