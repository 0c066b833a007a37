"""A guarded objective: what is not finite becomes a penalty, and everything else stays."""

import math
import subprocess
import sys
from decimal import Decimal

import numpy as np
import optuna
import pytest
import torch

import nanhunt
from nanhunt import guard_objective
from nanhunt.errors import NonFiniteError, UsageError

optuna.logging.set_verbosity(optuna.logging.ERROR)
NAN, INF = math.nan, math.inf


def told(value, **options):
    """What comes of an objective that returns a value, and the reason."""
    reasons = []
    guarded = guard_objective(
        lambda _: value, on_bad=lambda reason, error: reasons.append((reason, error)), **options
    )
    return guarded(None), reasons


@pytest.mark.parametrize(
    "value",
    [
        0.5,
        3,
        True,
        np.float32(0.5),
        np.array(2.0),
        torch.tensor(0.5),
        torch.tensor([0.5], requires_grad=True),
        torch.tensor(0.5, dtype=torch.bfloat16),
        Decimal("0.5"),
        (0.5, 1.0),
        [np.float64(1.0), torch.tensor(2.0)],
    ],
    ids=repr,
)
def test_finite_values_come_back_as_they_are(value):
    """The very object, and nobody is told."""
    back, reasons = told(value)
    assert back is value
    assert reasons == []


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (NAN, "the objective is nan"),
        (-INF, "the objective is -inf"),
        (np.float32(NAN), "the objective is nan"),
        (np.array([INF]), "the objective is inf"),
        (torch.tensor(NAN, requires_grad=True), "the objective is nan"),
        (torch.tensor(INF, dtype=torch.float16), "the objective is inf"),
        (10**400, "the objective is inf"),
        (None, "the objective is None: nothing was returned"),
        ("0.5", "the objective is no number: '0.5'"),
        ({}, "the objective is no number: {}"),
        (torch.zeros(2), "the objective is no number: tensor([0., 0.])"),
        (1j, "the objective is no number: 1j"),
        ((), "the objective is an empty tuple"),
    ],
    ids=repr,
)
def test_the_rest_becomes_the_penalty(value, reason):
    """With the reason, and no error."""
    assert told(value) == (1e6, [(reason, None)])
    assert told(value, penalty=7)[0] == 7.0


def test_several_objectives():
    """Each gets the penalty, or its own; the reason names which of them it was."""
    back, reasons = told((0.5, torch.tensor(NAN), None))
    assert back == (1e6, 1e6, 1e6)
    (reason, error) = reasons[0]
    assert error is None
    assert reason.split("; ") == [
        "objective 1: the objective is nan",
        "objective 2: the objective is None: nothing was returned",
    ]
    assert told((0.5, NAN), penalty=(1.0, -2.0))[0] == (1.0, -2.0)


def test_errors_become_the_penalty():
    """The kind of the error and its first line; the error itself for `on_bad`."""
    error = ValueError("\n  no such layer \nand more")
    seen = []

    @guard_objective(penalty=5.0, on_bad=lambda *words: seen.append(words))
    def objective(_):
        raise error

    assert objective(None) == 5.0
    assert seen == [("ValueError: no such layer", error)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, optuna.TrialPruned])
def test_what_passes_through(error):
    """Ctrl-C, an exit and Optuna's own pruning."""

    @guard_objective
    def objective(_):
        raise error

    with pytest.raises(error):
        objective(None)


def test_decorator_keeps_the_name():
    """With and without arguments."""

    @guard_objective
    def plain(trial):
        """Plain words."""
        return 1.0

    @guard_objective(penalty=2.0)
    def other(trial, *, scale):
        return NAN * scale

    assert (plain.__name__, plain.__doc__, plain(None)) == ("plain", "Plain words.", 1.0)
    assert (other.__name__, other(trial=None, scale=2)) == ("other", 2.0)


def test_study_goes_on():
    """Real trials: each failure has a penalty and its reason, the best is a healthy one."""

    @guard_objective(penalty=100.0)
    def objective(trial):
        x = trial.suggest_float("x", -1, 1)
        if trial.number == 1:
            raise RuntimeError("out of memory")
        return NAN if trial.number == 2 else x * x

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=5)
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 5
    assert [t.user_attrs.get("nanhunt") for t in study.trials] == [
        None,
        "RuntimeError: out of memory",
        "the objective is nan",
        None,
        None,
    ]
    assert [t.value == 100.0 for t in study.trials] == [False, True, True, False, False]
    assert study.best_value < 1


def test_maximised_objectives_are_punished_downwards():
    """A penalty never wins, whichever way the study goes."""
    study = optuna.create_study(direction="maximize")
    study.optimize(guard_objective(lambda t: 0.1 if t.number else NAN, penalty=9), n_trials=2)
    assert [t.value for t in study.trials] == [-9.0, 0.1]

    def two(trial):
        raise ValueError

    study = optuna.create_study(directions=["minimize", "maximize"])
    study.optimize(guard_objective(two), n_trials=1)
    assert study.trials[0].values == [1e6, -1e6]


@pytest.mark.parametrize("directions", [["minimize"], ["minimize", "maximize"]])
def test_pruned_trials(directions):
    """Pruned instead of punished, with the reason in the trial."""
    study = optuna.create_study(directions=directions)
    study.optimize(guard_objective(lambda _: NAN, prune=True), n_trials=1)
    assert study.trials[0].state.name == "PRUNED"
    assert study.trials[0].user_attrs == {"nanhunt": "the objective is nan"}


def test_the_culprit_is_in_the_reason():
    """What `detect` found while the objective trained: op, line and cause."""
    model = torch.nn.Linear(2, 1, bias=False)
    reasons = []

    @guard_objective(on_bad=lambda reason, error: reasons.append((reason, type(error))))
    def objective(_):
        with nanhunt.detect(model):
            loss = (model(torch.zeros(3, 2)) * 0).abs().sqrt().sum()
            loss.backward()
        return loss

    assert objective(None) == 1e6
    ((reason, kind),) = reasons
    assert kind is NonFiniteError
    assert reason.startswith("NonFiniteError: the loss is finite (0); 1 of 1 gradients are not")
    assert "; culprit: sqrt in its backward at " in reason
    assert reason.endswith("(infinite_derivative_at_boundary)")
    assert "test_objective.py:" in reason


@pytest.mark.parametrize("penalty", [NAN, INF, "1", (), (1.0, NAN), None])
def test_penalties_that_are_refused(penalty):
    """A penalty is a number that a study can take."""
    with pytest.raises(UsageError, match=r"^penalty is a finite number, or one for each objective"):
        guard_objective(lambda _: 1.0, penalty=penalty)


def test_what_cannot_be_guarded():
    """Neither a value nor a coroutine."""

    async def objective(_):
        return 1.0

    for wrong in (3.0, objective):
        with pytest.raises(UsageError, match=r"takes a plain function of a trial; got"):
            guard_objective(wrong)


def test_pruning_needs_optuna(monkeypatch):
    """Said when the objective is guarded, not when the first trial fails."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"^prune=True needs optuna, which is not installed"):
        guard_objective(lambda _: 1.0, prune=True)


def test_neither_torch_nor_optuna_is_imported():
    """Guarding a plain function costs nothing of either."""
    code = (
        "import sys, nanhunt; g = nanhunt.guard_objective(lambda t: float('nan')); "
        "print(g(1), [n for n in ('torch', 'optuna', 'numpy') if n in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.stderr) == ("1000000.0 []\n", "")
