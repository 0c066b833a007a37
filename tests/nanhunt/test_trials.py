"""Trials: what cures and is proven, what does not, and a subject that is left as it was."""

import itertools
import math
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from nanhunt import store
from nanhunt.cli import main
from nanhunt.hunting import Plan, investigate
from nanhunt.records import Trial
from nanhunt.replay import Change, replay
from nanhunt.report.trials import best, proof
from nanhunt.subject import Subject
from nanhunt.trials import CallMode
from nanhunt.trials.bench import Bench, Candidate
from nanhunt.trials.edits import Edit
from nanhunt.trials.trying import Patch
from nanhunt.trials.wholes import of_step
from nanhunt.variants import NATIVE

INF, NAN = math.inf, math.nan
SUBJECT = Path(__file__).parents[2] / "examples" / "subject.py"
X = torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 0.0]])
FAR = torch.tensor([[100.0, 0.0, 200.0], [50.0, 100.0, 1.0]])


class Net(nn.Module):
    """A weight that the fault is upstream of, and one that it never reaches."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=dtype))
        self.other = nn.Parameter(torch.tensor([0.5, 2.0], dtype=dtype))

    def forward(self, x):
        return self.weight * x

    def rest(self):
        return self.other.square().sum()


def examined(fault, batch=(X,), model=None, budget=30.0, **options):
    """The report on one step, replayed natively alone."""

    def loss_fn(m, *args):
        return fault(m, *args) + (m.rest() if isinstance(m, Net) else 0)

    subject = Subject(model or Net(), [batch], loss_fn, **options)
    return investigate(subject, Plan(precisions=("native",), budget=budget))[0]


def tried(*args, **options):
    """The trials that change the program."""
    return [t for t in examined(*args, **options).trials if not t.is_neutralising]


def proven(*args, **options):
    """The one that is proven, and what it is compared with."""
    (found,) = [t for t in tried(*args, **options) if t.is_proven]
    assert found.finite
    assert math.isfinite(found.loss)
    assert math.isfinite(found.gradient)
    return found


def in_graph(rows):
    """A mask that takes whole rows out."""
    return torch.tensor([[False] * 3, [True] * 3]) if rows else torch.zeros(2, 3).bool()


# -- what cures ------------------------------------------------------------------------------------

EDITS = {
    "sqrt": ("safe_argument", lambda m, x: m(x).sqrt().sum()),
    "log": ("safe_argument", lambda m, x: -m(x).log().mean()),
    "rsqrt": ("safe_argument", lambda m, x: m(x).rsqrt().mean()),
    "divisor": ("safe_denominator", lambda m, x: (m.weight / x).sum()),
    "reversed divisor": ("safe_denominator", lambda m, x: (1 / m(x)).sum()),
    "reciprocal": ("safe_denominator", lambda m, x: m(x).reciprocal().sum()),
    "where": ("double_where", lambda m, x: torch.where(m(x) > 0, m(x).log(), 0.0).sum()),
    "acos": ("safe_argument", lambda m, x: torch.acos(m(x) / 2).sum()),
    "exp": ("clamp", lambda m, x: torch.exp(m(100 * x)).clamp(max=10).sum()),
    "row": (
        "finfo_min_mask",
        lambda m, x: functional.softmax(m(x).masked_fill(in_graph(rows=True), -INF), -1)[
            :, 0
        ].sum(),
    ),
    "empty": ("skip_empty", lambda m, x: m(x)[x > 9].mean() + m(x).sum()),
    "one sample": ("correction_zero", lambda m, x: m(x)[:1, :1].std() + m(x).sum()),
    "logdet": ("diagonal_loading", lambda m, x: torch.logdet(m(x[:1]).mT @ m(x[:1]))),
    "layer_norm": (
        "eps_for_dtype",
        lambda m, x: functional.layer_norm(m(x[:, 1:2]).expand(2, 3) + m(x)[:, :1], (3,), eps=0.0)[
            0, 0
        ],
    ),
    "entropy": (
        "finite_constant",
        lambda m, x: (functional.softmax(m(x) + MASK, -1) * (m(x) + MASK)).sum(),
    ),
    "square": ("upcast", lambda m, x: (m(1e3 * x).half() ** 2).float().mean() * 1e-6),
    "xlogy": ("safe_argument", lambda m, x: torch.xlogy(x + 1, m(x)).sum()),
}
MASK = torch.tensor([0.0, -INF, 0.0])


@pytest.mark.filterwarnings("ignore:std():UserWarning")
@pytest.mark.parametrize("name", EDITS)
def test_edit_of_a_call(name):
    """The recipe of the cause makes it finite, and what was finite stays."""
    recipe, fault = EDITS[name]
    found = proven(fault)
    assert found.recipe == recipe
    # With every gradient finite and the loss not, there is nothing that they must agree with.
    assert (found.gradient_error is None) is (name in ("row", "empty"))
    assert "/test_trials.py:" in found.sites[0]
    assert found.times >= 1


def test_edit_of_a_call_in_a_hook():
    """The line in the hook is changed, and not the op whose gradient the hook was given."""

    def fault(m, x):
        y = m(x)
        y.register_hook(lambda g: g / g.abs().amax(0))
        return (y * torch.tensor([1.0, 0.0, 1.0])).sum()

    found = proven(fault)
    assert (found.recipe, found.change.partition(":")[0]) == ("safe_denominator", "div")


def test_edit_of_an_infinity_that_is_a_plain_number():
    """It is the largest finite number then, which 0 makes 0."""

    def fault(m, x):
        far = m(x) + (x == 0.5) * INF
        return far.clamp(max=5.0).sum()

    found = proven(fault)
    assert found.recipe == "finite_constant"
    assert "bounded" in found.change


def test_edit_of_a_rate():
    """A composite whose own keywords do not help has an edit of its first operand."""

    def fault(m, x):
        return functional.poisson_nll_loss(m(x - 0.7), torch.ones(2, 3), log_input=False)

    assert proven(fault).recipe == "clamp"


def test_stable_form_of_what_made_the_operand():
    """The root is of a difference that cancels; what is stable is the difference."""
    spread = torch.linspace(0, 0.1, 16).unsqueeze(1)

    def fault(m, x):
        h = 2000 + spread * m.weight
        var = h.square().mean(0) - h.mean(0).square()
        return (var.sqrt() - 1).square().sum()

    found = proven(fault)
    assert found.change == "computed by a stable form, sub → (x - mean)².mean()"
    assert found.reference == "fp64"


def squares(m, x):
    return m(x)[:, 1:2].pow(2).sum(-1).sqrt().sum() + m(x).sum()


FORMS = {
    "softplus": lambda m, x: torch.log(1 + torch.exp(m(x))).mean(),
    "log_softmax": lambda m, x: -functional.softmax(m(x), -1).log()[:, 1].mean(),
    "logsumexp": lambda m, x: m(x).exp().sum(-1).log().mean(),
    "logsigmoid(-z)": lambda m, x: torch.log(1 - torch.sigmoid(m(x))).mean(),
    "logsigmoid(z) - logsigmoid(-z)": lambda m, x: torch.logit(torch.sigmoid(m(x))).mean(),
    "exp(z - logsumexp(z))": lambda m, x: (m(x).exp() / m(x).exp().sum(-1, keepdim=True))[
        :, 0
    ].mean(),
    "logsumexp(z) of a stack": lambda m, x: (
        torch.stack([m(x).exp(), m(2 * x).exp()])[:, None].transpose(0, 1).sum(-1).log().mean()
    ),
    "logsumexp(z) of a cat": lambda m, x: (
        torch.cat([m(x).exp(), m(x).exp()], -1).sum(-1).log().sum()
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_stable_form(form):
    """The form with the same value on paper agrees with FP64, also where FP64 fails itself."""
    found = proven(FORMS[form], (FAR,))
    assert found.recipe == "stable_formulation"
    assert form.partition(" of ")[0] in found.change
    assert found.gradient_error < 1e-5
    assert found.loss_change < 1e-5
    assert found.reference.startswith("fp64")


@pytest.mark.parametrize("form", ["logsigmoid(-z)", "logsigmoid(z) - logsigmoid(-z)"])
def test_a_clamp_that_kills_the_gradient_is_not_proven(form):
    """log(1 - p) clamped is finite and has gradient 0: the stable form shows that it is wrong."""
    trials = tried(FORMS[form], (FAR,))
    wrong = [t for t in trials if t.finite and t.recipe != "stable_formulation"]
    assert wrong
    assert not any(t.is_proven for t in wrong)
    assert all(t.gradient_error > 0.1 for t in wrong)


# -- what does not, and what the record says then --------------------------------------------------


def test_no_recipe_for_a_backward_of_ones_own():
    """A formula of the user's that returns NaN whatever it is given is cured by nothing."""

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return torch.full_like(g, NAN)

    trials = tried(lambda m, x: Broken.apply(m(x)).sum())
    assert not [t for t in trials if t.finite]
    assert not [t for t in trials if t.is_proven]
    assert {proof(t) for t in trials} <= {"still non-finite", "raised"}


def bench_of(fault, batch=(X,), model=None, dtype="float32", **options):
    subject = Subject(model or Net(), [batch], fault, **options)
    native = replay(subject, batch, NATIVE, scope=None).run
    return Bench(subject, batch, native, dtype)


class Sites(CallMode):
    """Which calls there are."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def meet(self, call):
        self.found.setdefault(call.site.name, call.site)
        return self.proceed(call)


def site_of(fault, name, batch=(X,)):
    """The first call of that name."""
    sites = Sites()
    replay(Subject(Net(), [batch], fault), batch, scope=None, change=Change(sites.entered))
    return sites.found[name]


def tried_edit(fault, name, edit, batch=(X,), **options):
    """One edit at the call of that name."""
    patch = Patch({site_of(fault, name, batch): edit})
    candidate = Candidate(edit.recipe, edit.text, patch)
    return bench_of(fault, batch, **options).try_out(candidate).trial


def root(m, x):
    return m(x).sqrt().sum() + m.rest()


@pytest.mark.parametrize(
    ("text", "is_proven", "told"),
    [
        ("{x}.clamp_min(1e-8)", True, "gradient agrees"),
        ("{x}.clamp_min(0.5)", False, "loss changed by"),
        ("{x}.detach().clamp_min(1e-8)", False, "exactly 0: nothing is learnt there"),
        ("{x} * 0 + 1", False, "loss changed by"),
        ("{x} + 0", False, "still non-finite"),
        ("{x}.no_such()", False, "raised"),
    ],
)
def test_proof_of_a_finite_loss(text, is_proven, told):
    """A change that destroys the loss or the gradient is finite and not proven."""
    trial = tried_edit(root, "sqrt", Edit("any", "x", text))
    assert trial.is_proven is is_proven
    assert told in proof(trial)


def test_a_dropped_term_is_seen_behind_a_large_one():
    """A term that is a thousandth of the loss, and a parameter of a small gradient, count."""

    def fault(m, x):
        return {"big": 1e3 * m.rest(), "small": 50 * m(x).sqrt().sum()}

    assert tried_edit(fault, "sqrt", Edit("any", "x", "{x}.clamp_min(1e-8)")).is_proven
    dropped = tried_edit(fault, "sqrt", Edit("any", "call", "{x} * 0"))
    assert dropped.finite
    assert not dropped.is_proven


def test_other_finite_gradients_are_to_stay():
    """With a non-finite loss it is the gradients that never failed which tell."""

    def fault(m, x):
        return m(x).log().sum() + (m.other * 3).sum()

    good = tried_edit(fault, "log", Edit("any", "x", "{x}.clamp_min(1e-8)"))
    assert (good.is_proven, good.reference) == (True, "native, where finite")
    halved = tried_edit(fault, "sum", Edit("any", "call", "{call}.clamp(-50, 0)"))
    assert not halved.is_proven


def test_finite_gradients_out_of_the_domain_tell_nothing():
    """log1p below -1 has a derivative, of no real function: a cure need not agree with it."""
    trial = tried_edit(
        lambda m, x: m(-1.5 * x).log1p().sum() + m.rest(),
        "log1p",
        Edit("any", "x", "{x}.clamp_min(1e-6 - 1)"),
        (torch.tensor([[1.0, 0.2, 0.3]]),),
    )
    assert trial.is_proven
    assert (trial.gradient_error, trial.reference) == (None, "")


def test_hiding_is_no_proof():
    """The largest number instead of an infinity is finite, and that is all."""
    trial = tried_edit(
        lambda m, x: m(x).log().sum(), "log", Edit("saturate", "x", "{x}.clamp_min(1e-8)")
    )
    assert trial.finite
    assert trial.is_unverified
    assert not trial.is_proven
    assert "cannot be compared" in proof(trial)


FINE = Trial("x", "x", finite=True, loss_change=0.0, gradient_error=0.0, reference="fp64")


@pytest.mark.parametrize(
    ("changes", "is_proven"),
    [
        ({}, True),
        ({"finite": False}, False),
        ({"recipe": "neutralise"}, False),
        ({"loss_change": 2e-3}, False),
        ({"gradient_error": 2e-2}, False),
        ({"loss_change": None, "gradient_error": None}, True),
        ({"loss_change": None, "gradient_error": None, "result_change": 0.5}, False),
        ({"result_change": 0.5}, True),  # the loss and the gradients say more
        ({"loss_change": None, "gradient_error": None, "loss": 5.7e36}, False),
        ({"loss_change": None, "loss": -1e30}, False),
        ({"loss": 5.7e36}, True),  # as it was
        ({"vanished": 1}, False),
        ({"vanished": 1, "revived": 2}, True),
        ({"vanished": 1, "recipe": "skip_empty"}, True),
        ({"recipe": "saturate"}, True),
        ({"recipe": "clamp + saturate", "reference": "native, where finite"}, False),
        ({"recipe": "detach_vectors", "gradient_error": None, "reference": ""}, False),
    ],
)
def test_what_a_proof_is(changes, is_proven):
    """Every part of the definition by itself."""
    made = Trial(**{**{f: getattr(FINE, f) for f in FINE.__dataclass_fields__}, **changes})
    assert made.is_proven is is_proven


def test_a_loss_that_is_finite_in_name_only():
    """The lowest number of the dtype for a mask that reaches the loss is no cure."""

    def fault(m, x):
        z = m(x).masked_fill(torch.arange(3) > 1, -INF)
        return functional.cross_entropy(z, torch.tensor([0, 1]), label_smoothing=0.1)

    report = examined(fault)
    assert report.culprits[0].cause == "infeasible_target"
    assert not any(trial.is_proven for trial in report.trials)
    endless = [trial for trial in report.trials if trial.finite and abs(trial.loss) > 1e18]
    assert endless
    assert all("is finite in name only" in proof(trial) for trial in endless)


def test_segments_without_elements():
    """The mean of nothing contributes nothing; the others stay as they are."""

    def fault(m, x):
        lengths = torch.tensor([1, 0, 1])
        return torch.segment_reduce(m(x), "mean", lengths=lengths, axis=0).sum()

    found = proven(fault)
    assert found.recipe == "skip_empty"


# -- the whole step --------------------------------------------------------------------------------


def test_smaller_loss_scale():
    """A gradient that overflows half precision fits with a smaller scale, and is scaled back."""

    def fault(m, x):
        return (m(x).half() * 30).float().sum() * 2500

    found = proven(fault)
    assert "smaller_loss_scale" in found.recipe or found.recipe == "upcast"
    assert found.gradient_error < 0.01


def test_loss_scale_below_that_of_a_scaler():
    """Its own scales end at 1; what overflows there may fit a smaller one all the same."""

    def fault(m, x):
        with torch.autocast("cpu", torch.float16):
            y = m(x)
        return (y / torch.tensor(6e-5, dtype=torch.float16)).float().sum() * 1e2

    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    subject = Subject(model, [(X,)], fault, optimizer=optimizer, scaler=scaler)
    report = investigate(subject, Plan(precisions=("native",)))[0]
    smaller = [*of_step(report.culprits[0], subject, (X,))]
    assert [each.scale for each in smaller] == [2.0**-4, 2.0**-8, 2.0**-12]
    assert smaller[0].told == "a loss scale of 2^-4, below that of the scaler"
    bench = Bench(subject, (X,), report.native, "float16")
    trials = [bench.try_out(each).trial for each in smaller]
    assert [trial.is_proven for trial in trials] == [False, True, True]
    assert trials[1].gradient_error < 0.01
    assert scaler.get_scale() == 1.0


def test_optimizer_eps():
    """An eps that is 0 in the dtype of the state is found; nothing compares the update."""
    model = Net(torch.float16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-8)

    def fault(m, x):
        return (m(x.half() * 0).sum() + m.other.sum()).float()

    subject = Subject(model, [(X,)], fault, optimizer=optimizer)
    report = investigate(subject, Plan(precisions=("native",)))[0]
    found = best(report)
    assert found.recipe == "optimizer_eps"
    assert found.is_proven
    assert (found.loss_change, found.gradient_error) == (None, None)
    assert optimizer.param_groups[0]["eps"] == 1e-8
    assert not optimizer.state


@pytest.mark.parametrize("value", [NAN, INF])
def test_bad_samples_are_left_out(value):
    """A batch with numbers that are none is tried without these samples."""
    x = X.clone()
    x[1, 0] = value
    found = proven(lambda m, x: m(x).mean(), (x,))
    assert found.recipe == "validate_batch"
    assert "1 of 2 samples" in found.change
    assert found.loss_change is None


def test_initialised_anew():
    """Statistics that hold NaN are set as their class does it; the module keeps its own."""
    model = nn.BatchNorm1d(3).eval()
    model.running_mean.fill_(NAN)
    found = proven(lambda m, x: m(x).sum(), model=model)
    assert found.recipe == "initialise"
    assert bool(model.running_mean.isnan().all())


def test_nudged_argument():
    """A function of which nothing is known is kept away from where it is not finite."""
    trials = tried(lambda m, x: torch.special.ndtri(m(x) / 2).sum())
    found = next(t for t in trials if t.is_proven)
    assert (found.recipe, found.before) == ("safe_argument", None)
    assert "nudged" in found.change


# -- where calls are made from ---------------------------------------------------------------------


def test_two_calls_on_one_line():
    """Only the call that fails is changed."""
    found = proven(lambda m, x: (x + 1).sqrt().sum() + m(x).sqrt().sum())
    assert found.times == 1
    assert found.after.count("clamp_min") == 1
    assert "m(x).clamp_min(1e-08).sqrt()" in found.after


def in_a_loop(m, x):
    total = 0.0
    for row in m(x):
        total = total + row.sqrt().sum()
    return total


def in_normalize(m, x):
    return functional.normalize(m(x[:, 1:2]), dim=-1, eps=0.0).sum() + m(x).sum()


ATTENTION = nn.MultiheadAttention(3, 1, batch_first=True)


def in_attention(m, x):
    """One of two sequences is nothing but padding."""
    y = m(x).repeat(2, 1, 1)
    pad = torch.tensor([[False, False], [True, True]])
    return ATTENTION(y, y, y, key_padding_mask=pad)[0].sum() + m(x).sum()


def checkpointed(m, x, *, reentrant):
    return checkpoint(lambda y: y.sqrt().sum(), m(x), use_reentrant=reentrant)


class Rooted(torch.autograd.Function):
    """Its own backward divides by what may be 0."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sqrt()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g / (2 * x.sqrt())


def in_threads(m, x):
    sums = []
    thread = threading.Thread(target=lambda: sums.append(m(x).sqrt().sum()))
    thread.start()
    thread.join()
    return sums[0]


def in_a_pool(m, x):
    with ThreadPoolExecutor(2) as pool:
        return torch.stack([*pool.map(lambda row: m(row).sqrt().sum(), (x, x))]).sum()


@torch.compile(backend="eager")
def compiled(y):
    return y.sqrt().sum()


PLACES = {
    "loop": (in_a_loop, 2),
    "normalize": (in_normalize, 1),
    "checkpoint": (lambda m, x: checkpointed(m, x, reentrant=False), 1),
    "attention": (in_attention, 1),
    "reentrant": (lambda m, x: checkpointed(m, x, reentrant=True), 2),
    "own backward": (lambda m, x: Rooted.apply(m(x)).sum(), 1),
    "compiled": (lambda m, x: compiled(m(x)), 1),
    "thread": (in_threads, 1),
    "pool": (in_a_pool, 2),
    "vmap": (lambda m, x: torch.vmap(lambda row: row.sqrt().sum())(m(x)).sum(), 1),
}


@pytest.mark.parametrize("place", PLACES)
def test_call_sites(place):
    """A call is found and changed wherever it is made from, each time that it is made."""
    fault, times = PLACES[place]
    found = proven(fault)
    assert found.times == times


class Counting(TorchFunctionMode):
    """A mode of the user's own."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_under_modes_of_the_user():
    """A mode around the hunt sees on, and stands where it stood."""
    with torch.device("cpu"), Counting() as mode:
        before = _get_current_function_mode_stack()
        assert proven(EDITS["sqrt"][1]).recipe == "safe_argument"
        assert _get_current_function_mode_stack() == before
        seen = mode.calls
        torch.ones(2).sqrt()
        assert mode.calls > seen
    assert not _get_current_function_mode_stack()


def test_in_the_step_under_a_mode():
    """A mode that the step itself enters is passed through."""

    def fault(m, x):
        with torch.device("cpu"):
            return m(x).sqrt().sum()

    assert proven(fault).times == 1


# -- a subject that is left as it was --------------------------------------------------------------


def state_of(subject):
    """Everything that a trial could leave changed."""
    options = [
        {k: v for k, v in g.items() if k != "params"} for g in subject.optimizer.param_groups
    ]
    return (
        {n: t.clone() for n, t in subject.model.state_dict().items()},
        {n: p.grad.clone() for n, p in subject.model.named_parameters()},
        [module.training for module in subject.model.modules()],
        options,
        {n: f for n, f in vars(torch.Tensor).items() if n in ("sqrt", "log", "div")},
        (torch.get_rng_state(), random.getstate(), torch.is_grad_enabled()),
        _get_current_function_mode_stack(),
        threading.Thread.start,
    )


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def rich_subject(fault):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Subject(model, [(X,)], fault, optimizer=optimizer)


def raises_when_edited(m, x):
    roots = m(x).abs().sqrt()
    if bool((roots > 0).all()):
        raise RuntimeError("edited")
    return roots.sum()


def drops_out(m, x):
    return m(x).abs().sqrt().sum()


@pytest.mark.parametrize("fault", [drops_out, raises_when_edited])
def test_left_as_it_was(fault):
    """Parameters, buffers, gradients, options, generators, modes and functions."""
    subject = rich_subject(fault)
    before = state_of(subject)
    report = investigate(subject, Plan(precisions=("native",)))[0]
    assert report.verdict == "culprit"
    assert len(report.trials) > 1
    assert same(before, state_of(subject))


class Stopping:
    """Interrupts the step on its n-th run."""

    def __init__(self, runs):
        self.runs = runs

    def __call__(self, m, x):
        loss = m(x).abs().sqrt().sum()
        self.runs -= 1
        if self.runs == 0:
            raise KeyboardInterrupt
        return loss


@pytest.mark.parametrize("part", [0.5, 1.0])
def test_interrupted(part):
    """An interrupt in the middle of a trial passes, and everything is put back."""
    counting = Stopping(-1)
    investigate(rich_subject(counting), Plan(precisions=("native",), budget=30))
    without = Stopping(-1)
    investigate(rich_subject(without), Plan(precisions=("native",), budget=0))
    in_trials, before_them = -1 - counting.runs, -1 - without.runs
    assert in_trials > before_them
    subject = rich_subject(Stopping(before_them - 2 + max(int(part * 3), 1)))
    before = state_of(subject)
    with pytest.raises(KeyboardInterrupt):
        investigate(subject, Plan(precisions=("native",)))
    assert same(before, state_of(subject))


def test_interrupted_in_an_edit(monkeypatch):
    """An interrupt inside of a changed call leaves no mode and no gradient behind."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Edit, "apply", interrupt)
    subject = rich_subject(drops_out)
    before = state_of(subject)
    with pytest.raises(KeyboardInterrupt):
        investigate(subject, Plan(precisions=("native",)))
    assert same(before, state_of(subject))


# -- the search ------------------------------------------------------------------------------------


def test_quick():
    """Without a budget nothing is tried, and the report says so."""
    report = examined(EDITS["sqrt"][1], budget=0)
    assert [t.recipe for t in report.trials] == ["neutralise"]
    assert "fixes: none was tried (--quick)" in report.not_checked


def test_budget_is_spent_in_the_middle(monkeypatch):
    """What there was no time for is counted."""
    clock = itertools.count()
    monkeypatch.setattr("nanhunt.trials.search.time.perf_counter", lambda: float(next(clock)))
    report = examined(FORMS["logsigmoid(-z)"], (FAR,), budget=2.5)
    made = [t for t in report.trials if not t.is_neutralising]
    assert 0 < len(made) <= 3
    told = [n for n in report.not_checked if n.startswith("fixes: ")]
    assert len(told) == 1
    assert told[0].endswith("more, for which there was no time")


def test_cured_culprit_is_not_tried_further():
    """After a proof only beliefs that are worth refuting are tried."""
    assert len(tried(EDITS["sqrt"][1])) == 1


def test_two_faults_are_cured_together():
    """What is left behind a change that did not suffice is changed as well."""
    found = proven(lambda m, x: m(x).log().sum() + (m.weight / x).sum())
    assert " + " in found.recipe
    assert len(found.sites) == 2
    assert found.before is None


def test_trials_come_through_the_store():
    """A report with trials is the same after a round trip."""
    report = examined(EDITS["sqrt"][1])
    again = store.parse(store.dump(report))
    assert store.dump(again) == store.dump(report)
    assert [t.is_proven for t in again.trials] == [False, True]


@pytest.mark.parametrize("quick", [True, False])
def test_command(quick, monkeypatch, capsys):
    """`--quick` leaves the trials out; without it the fix stands in the verdict."""
    words = ["nanhunt", "replay", str(SUBJECT) + ":build", "--precision", "native"]
    monkeypatch.setattr(sys, "argv", [*words, "--quick"] if quick else words)
    with pytest.raises(SystemExit) as left:
        main()
    out = capsys.readouterr().out
    assert left.value.code == 0
    assert ("none was tried (--quick)" in out) is quick
    assert (" fix " in out) is not quick
