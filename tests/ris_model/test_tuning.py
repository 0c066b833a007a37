"""Tuning: spaces, guarded objectives, workers that share, resume and are killed."""

import json
import math
import multiprocessing
import os
import signal
import time
import warnings
from dataclasses import replace

import optuna
import pytest
from optuna.storages._heartbeat import is_heartbeat_enabled
from optuna.trial import FixedTrial, TrialState
from typer.testing import CliRunner

from ris_model.__main__ import app
from ris_model.commands import options
from ris_model.config import Config
from ris_model.storage import read_fields
from ris_model.subject import assemble, choose_config
from ris_model.training.journal import Epoch
from ris_model.tuning.pictures import draw_history, draw_parameters
from ris_model.tuning.spaces import SPACES, Choice, Real, change_field, choose_space, draw_config
from ris_model.tuning.study import (
    PENALTY,
    Judge,
    NonFiniteError,
    Search,
    count_told,
    find_best,
    guard,
    open_study,
    plan_trial,
    run_search,
    write_results,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Optuna's storages keep connections open until they are collected
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

EXTENTS = [(profile, extent) for profile in SPACES for extent in SPACES[profile]]


class Edge:
    """Chooses the lowest, the highest or the n-th value everywhere."""

    def __init__(self, place):
        self.place = place

    def suggest_float(self, name, low, high, *, log=False):
        return high if self.place else low

    def suggest_int(self, name, low, high, *, step=1):
        assert (high - low) % step == 0
        return high if self.place else low

    def suggest_categorical(self, name, choices):
        return choices[self.place % len(choices)]


def plan(storage, **changes) -> Search:
    """A search of a few steps per trial."""
    config = choose_config("sound", "tiny")
    training = replace(config.training, epoch_scenes=32, validation_scenes=16)
    options = {
        "config": replace(config, training=training),
        "profile": "sound",
        "rows": choose_space("sound", "narrow")[:1],
        "name": "s",
        "trials": 2,
        "epochs": 1,
        "storage": str(storage),
        "seed": 1,
    }
    return Search(**{**options, **changes})


@pytest.fixture
def storage(tmp_path):
    """A database's URL."""
    return f"sqlite:///{tmp_path}/search.db"


@pytest.mark.parametrize(("profile", "extent"), EXTENTS)
@pytest.mark.parametrize("place", range(4))
def test_every_corner_of_a_space_can_be_built(profile, extent, place):
    """A network and its objective, whatever is drawn."""
    config = choose_config(profile, "tiny")
    drawn = draw_config(config, SPACES[profile][extent], Edge(place))
    assert drawn != config
    assemble(drawn, profile, seed=0)


@pytest.mark.parametrize("profile", SPACES)
def test_narrow_lies_inside_wide(profile):
    """Fewer numbers, closer bounds."""
    wide = {getattr(row, "path", ""): row for row in SPACES[profile]["wide"]}
    narrow = SPACES[profile]["narrow"]
    assert len(narrow) < len(wide)
    for row in narrow:
        around = wide[row.path]
        assert around.low <= row.low < row.high <= around.high
        assert row.high / row.low < around.high / around.low


def test_fields_are_changed_by_their_paths():
    """Together where they belong together; a wrong path is an error."""
    config = choose_config("incident", "tiny")
    shape = next(row for row in SPACES["incident"]["wide"] if isinstance(row, Choice))
    drawn = draw_config(config, (shape,), FixedTrial({"network.shape": "448 by 7"}))
    assert (drawn.network.width, drawn.network.heads) == (448, 7)
    assert replace(drawn, network=config.network) == config
    with pytest.raises(AttributeError):
        change_field(config, "network.colour.hue", 1)
    with pytest.raises(ValueError, match=r"^there is no space 'vast'; choose one of wide, narrow$"):
        choose_space("sound", "vast")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (math.inf, "val=inf"),
        (math.nan, "val=nan"),
        (None, "val=None"),
        (ZeroDivisionError("by nought"), "ZeroDivisionError: by nought"),
    ],
)
def test_objective_is_guarded(answer, reason):
    """A penalty, and the reason with the trial and in the log."""

    def run():
        if isinstance(answer, Exception):
            raise answer
        return answer

    trial, lines = FixedTrial({}), []
    assert guard(run, trial, lines.append) == PENALTY
    assert trial.user_attrs == {"reason": reason}
    assert lines == [f"[HPO] Non-finite objective ({reason}), returning large penalty (1e6)"]


def test_guard_lets_through_what_is_meant():
    """A finite value, a pruned trial, an interruption."""
    assert guard(lambda: 2.5, FixedTrial({}), print) == 2.5
    for error in (optuna.TrialPruned, KeyboardInterrupt):

        def stop(error=error):
            raise error

        with pytest.raises(error):
            guard(stop, FixedTrial({}), print)


def test_judge_reports_and_prunes():
    """Values go to the pruner; one that is not finite never does."""
    study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=5.0))
    judge = Judge(study.ask())
    judge.note(note(1, 4.0))
    with pytest.raises(optuna.TrialPruned):
        judge.note(note(2, 6.0))
    with pytest.raises(NonFiniteError, match=r"^val=nan in epoch 3$"):
        judge.note(note(3, math.nan))
    assert study.trials[0].intermediate_values == {1: 4.0, 2: 6.0}


def note(number: int, val: float) -> Epoch:
    """An epoch with this loss."""
    return Epoch(number, 9, "p", 1, 1, 1.0, val, {}, 1.0, (1.0,), 0, None, 1.0)


def test_search_resumes_and_tells(storage, tmp_path):
    """Two trials, then one more; the table, the best configuration and the figures."""
    lines = []
    run_search(plan(storage), lines.append)
    assert [line.rpartition(" value=")[0] for line in lines] == [
        "[HPO] trial=0 complete",
        "[HPO] trial=1 complete",
    ]
    search = plan(storage, trials=3)
    study = run_search(search, lines.append)
    assert count_told(study) == len(lines) == 3
    run_search(search, lines.append)
    assert len(lines) == 3
    write_results(search, study, tmp_path)
    rows = (tmp_path / "trials.csv").read_text().splitlines()
    assert rows[0] == "trial,state,value,epochs,reason,training.learning_rate"
    assert len(rows) == 4
    best = find_best(study)
    assert best.value == min(trial.value for trial in study.trials)
    config = read_fields(Config, json.loads((tmp_path / "best.json").read_text()))
    rate = best.params["training.learning_rate"]
    assert config == change_field(search.config, "training.learning_rate", rate)
    for name, draw in (("h.png", draw_history), ("p.png", draw_parameters)):
        draw(study, tmp_path / name)
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_trial_is_weighed_by_the_profile(storage):
    """Light weights do not win: all trials are measured by the same ones."""
    row = Real("weights.lam_heatmap", 1e-3, 1.0001e-3)
    light = run_search(plan(storage, trials=1, rows=(row,)), print).best_value
    same = Real("weights.lam_heatmap", 1.0, 1.0001)
    usual = run_search(plan(storage, trials=1, rows=(same,), name="t"), print).best_value
    assert light == pytest.approx(usual, rel=0.2)


def test_trial_trains_for_its_epochs():
    """Scenes, not steps: a larger batch has fewer of them, and a warm-up in proportion."""
    search = plan("", epochs=12)
    for size, steps in ((8, 48), (16, 24)):
        config = change_field(search.config, "training.batch_size", size)
        training = plan_trial(search, config).training
        assert (training.steps, training.warmup) == (steps, steps // 10)


def test_workers_share_a_storage(storage):
    """Two at once: no trial twice, at most one too many; each has choices of its own."""
    workers = [fork(plan(storage, trials=4, seed=seed)) for seed in (1, 2)]
    for worker in workers:
        worker.join(timeout=120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    study = open_study(plan(storage))
    assert 4 <= count_told(study) <= 5
    rates = {trial.params["training.learning_rate"] for trial in study.trials}
    assert len(rates) == len(study.trials)


@pytest.mark.parametrize("kind", ["database", "journal"])
def test_killed_worker_loses_its_trial_alone(storage, tmp_path, kind):
    """The trial is failed when it gives no sign of life, and made again by another worker."""
    where = storage if kind == "database" else f"journal:{tmp_path}/search.log"
    long = plan(where, trials=1, epochs=100_000, heartbeat=1)
    worker = fork(long)
    study = open_study(long)
    end = time.monotonic() + 60
    while not any(trial.intermediate_values for trial in study.trials):
        assert time.monotonic() < end
        time.sleep(0.1)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    # of its rate: no heart beats for two intervals
    time.sleep(3.0)
    again = run_search(replace(long, epochs=1), lambda _: None)
    states = [trial.state for trial in again.trials]
    assert states[0] == TrialState.FAIL
    assert states.count(TrialState.COMPLETE) == 1
    lost, told = again.trials[0], again.get_trials(states=[TrialState.COMPLETE])[0]
    assert told.params == lost.params or TrialState.WAITING in states


def fork(search: Search) -> multiprocessing.Process:
    """Run a search in a process of its own."""
    worker = multiprocessing.get_context("fork").Process(
        target=run_search, args=(search, lambda _: None)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 on: of a fork beside threads
        worker.start()
    return worker


def test_journal_file_is_a_storage(tmp_path):
    """Where no database is."""
    study = run_search(plan(f"journal:{tmp_path}/search.log", trials=1), print)
    assert count_told(study) == 1


def test_journal_that_cannot_be_written_is_refused(tmp_path):
    """One sentence, as for a database."""
    for path in (tmp_path, tmp_path / "nowhere" / "search.log"):
        with pytest.raises(ValueError, match=r"storage 'journal:.*' cannot be opened \(.*give for"):
            open_study(plan(f"journal:{path}"))


def test_living_trial_of_a_journal_is_left_alone(tmp_path):
    """Its signs are younger than the grace; one that has given none has only just begun."""
    search = plan(f"journal:{tmp_path}/search.log", heartbeat=1)
    study = open_study(search)
    storage, number = study._storage, study._study_id
    trial = storage.create_new_trial(number)
    assert storage._get_stale_trial_ids(number) == []
    storage.record_heartbeat(trial)
    assert storage._get_stale_trial_ids(number) == []
    time.sleep(2.2)
    assert storage._get_stale_trial_ids(number) == [trial]
    assert is_heartbeat_enabled(storage)


def invoke(*arguments: object):
    """Run a command in this process."""
    return CliRunner().invoke(app, ["search", *map(str, arguments)])


def test_search_of_the_incident_is_penalised(storage, tmp_path):
    """The NaN is the reason that stays with the trial; exit code 1."""
    result = invoke(
        *("--storage", storage, "--out", tmp_path / "out", "--preset", "tiny"),
        *("--profile", "incident", "--space", "narrow", "--trials", 1, "--epochs", 1),
    )
    assert result.exit_code == 1
    reason = "StalledError: the first 30 steps were all skipped (gradients not finite)"
    assert f"[HPO] Non-finite objective ({reason}" in result.output
    assert "returning large penalty (1e6)" in result.output
    assert result.stderr.startswith(f"ris-model: no trial had a finite objective ({reason}")
    assert (tmp_path / "out" / "trials.csv").exists()
    assert not (tmp_path / "out" / "best.json").exists()


def test_wrong_input_of_search_is_one_sentence(storage, tmp_path, monkeypatch):
    """Exit code 2; so is a package that is not installed."""
    for arguments, sentence in (
        (("--space", "vast"), "there is no space 'vast'; choose one of wide, narrow"),
        (("--trials", 0), "trials is 0; give a whole number from 1 to"),
        (("--epochs", 0), "epochs is 0; give a whole number from 1 to"),
        (("--preset", "huge"), "there is no preset 'huge'"),
        (("--storage", "nowhere"), "the storage 'nowhere' cannot be opened ("),
        (("--storage", f"sqlite:///{tmp_path}/no/x.db"), "cannot be opened ("),
    ):
        result = invoke("--out", tmp_path / "out", *arguments)
        assert result.exit_code == 2, result.output
        assert sentence in result.stderr
        assert len(result.stderr.splitlines()) == 1
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    result = invoke("--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr == (
        "ris-model: this needs optuna, which is not installed: pip install 'nanhunt[ris]'\n"
    )
    assert options.need_extra.__module__ == "ris_model.commands.options"
    assert not (tmp_path / "out").exists()
