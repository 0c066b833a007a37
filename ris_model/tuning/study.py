"""Study: trainings with drawn configurations, shared by several workers through one storage.

The validation loss of a trial is weighed as the profile's own configuration weighs it, whatever
weights the trial trains with: otherwise the lightest weights would win.
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages import RetryHeartbeatStaleTrialCallback as Retry
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import DatabaseError, SQLAlchemyError

from ris_model.checkpoint import Origin
from ris_model.config import Config, Profile
from ris_model.storage import write_whole
from ris_model.subject import assemble
from ris_model.training.feeds import draw_feeds
from ris_model.training.journal import Deaf, Epoch
from ris_model.training.loop import Setting, Trainer
from ris_model.training.ranks import Ranks
from ris_model.tuning.heartbeat import LivingJournal
from ris_model.tuning.spaces import Row, draw_config

# What a trial without a finite objective is worth.
PENALTY = 1e6
# Epochs that no trial is ended before.
_WARM_UP = 6
# Seconds that a worker waits for another one's writing to SQLite.
_PATIENCE = 60
# How often, and after how many seconds, a database is opened again.
_TRIES, _PAUSE = 5, 0.3
# A trial in one of these states has told what it can.
_TOLD = (TrialState.COMPLETE, TrialState.PRUNED)
_JOURNAL = "journal:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What is searched, how long, and where that is kept."""

    config: Config  # what the space changes
    profile: Profile
    rows: tuple[Row, ...]
    name: str  # of the study: workers of the same name share it
    trials: int  # told ones, of all workers together
    epochs: int  # of a trial
    storage: str  # a database's URL, or journal:FILE
    seed: int | None = None  # of the sampler; workers on one storage need different ones
    heartbeat: int = 30  # seconds between a worker's signs of life; its trial is lost after two


class NonFiniteError(ArithmeticError):
    """A validation loss was not finite."""


class Judge(Deaf):
    """Reports each epoch of a trial; ends it when it is hopeless."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial

    def note(self, epoch: Epoch) -> None:
        """Report; raise TrialPruned or NonFiniteError."""
        if not math.isfinite(epoch.val):
            msg = f"val={epoch.val} in epoch {epoch.number}"
            raise NonFiniteError(msg)
        self.trial.report(epoch.val, epoch.number)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def run_search(search: Search, say: Callable[[str], None]) -> optuna.Study:
    """Make trials until the study has as many as are wanted; go on with those it has.

    Raises:
        ValueError: when the storage cannot be opened.
    """
    study = open_study(search)

    def stop(study: optuna.Study, _: FrozenTrial) -> None:
        if count_told(study) >= search.trials:
            study.stop()

    def objective(trial: Trial) -> float:
        return guard(lambda: train_trial(search, trial), trial, say)

    def tell(_: optuna.Study, trial: FrozenTrial) -> None:
        value = "none" if trial.value is None else f"{trial.value:.6f}"
        state = trial.state.name.lower()
        epochs = len(trial.intermediate_values)
        say(f"[HPO] trial={trial.number} {state} value={value} epochs={epochs}")

    if count_told(study) < search.trials:
        study.optimize(objective, callbacks=[tell, stop])
    return study


def open_study(search: Search) -> optuna.Study:
    """Open or begin the study."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        # multivariate sampling in groups and signs of life may still change in Optuna
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(multivariate=True, group=True, seed=search.seed)
        return optuna.create_study(
            storage=_open_storage(search),
            sampler=sampler,
            pruner=optuna.pruners.MedianPruner(n_warmup_steps=_WARM_UP),
            study_name=search.name,
            load_if_exists=True,
            direction="minimize",
        )


def _open_storage(search: Search, tries: int = _TRIES) -> BaseStorage:
    """Open the storage, a journal file or a database; both with signs of life."""
    try:
        if search.storage.startswith(_JOURNAL):
            return LivingJournal(search.storage.removeprefix(_JOURNAL), heartbeat=search.heartbeat)
        return _open_database(search)
    except (SQLAlchemyError, StorageInternalError, RuntimeError, ImportError, OSError) as error:
        # a worker that begins beside this one may be making the very same tables
        if tries > 1 and isinstance(error, DatabaseError | StorageInternalError):
            time.sleep(_PAUSE)
            return _open_storage(search, tries - 1)
        reason = " ".join(str(error).split())
        msg = (
            f"the storage {search.storage!r} cannot be opened ({reason}); give for instance "
            "sqlite:///search.db or journal:search.log"
        )
        raise ValueError(msg) from None


def _open_database(search: Search) -> RDBStorage:
    """Open a database; its workers give signs of life, and a lost trial is made once more."""
    options = {"connect_args": {"timeout": _PATIENCE}} if "sqlite" in search.storage else {}
    return RDBStorage(
        search.storage,
        engine_kwargs=options,
        heartbeat_interval=search.heartbeat,
        heartbeat_stale_trial_callback=Retry(max_retry=1),
    )


def count_told(study: optuna.Study) -> int:
    """Trials that have told what they can."""
    return len(study.get_trials(deepcopy=False, states=_TOLD))


def guard(run: Callable[[], float | None], trial: Trial, say: Callable[[str], None]) -> float:
    """Return a finite objective whatever a training does; the reason stays with the trial."""
    try:
        value = run()
    except optuna.TrialPruned:
        raise
    except Exception as error:  # noqa: BLE001  no trial may end the search
        reason = f"{type(error).__name__}: {error}"
    else:
        if value is not None and math.isfinite(value):
            return value
        reason = f"val={value}"
    trial.set_user_attr("reason", reason)
    say(f"[HPO] Non-finite objective ({reason}), returning large penalty (1e6)")
    return PENALTY


def train_trial(search: Search, trial: Trial) -> float | None:
    """Train with what a trial chooses; return its best validation loss."""
    config = plan_trial(search, draw_config(search.config, search.rows, trial))
    subject = assemble(config, search.profile, seed=0)
    setting = Setting(
        subject=subject,
        origin=Origin(config, search.profile, seed=0, amp="off"),
        feeds=draw_feeds(config, seed=0, ranks=Ranks()),
        reference=asdict(search.config.weights),
        listeners=(Judge(trial),),
    )
    trainer = Trainer(setting)
    trainer.run()
    return trainer.at.best


def plan_trial(search: Search, config: Config) -> Config:
    """Return a configuration that trains for the epochs of a trial, warm-up in proportion."""
    training = config.training
    steps = search.epochs * training.epoch_steps
    warmup = min(training.warmup, steps // 10)
    changes: dict[str, Any] = {"steps": steps, "warmup": warmup, "patience": search.epochs}
    return replace(config, training=replace(training, **changes))


def find_best(study: optuna.Study) -> FrozenTrial | None:
    """The best trial; None where no trial had a finite objective."""
    good = [t for t in study.get_trials(states=(TrialState.COMPLETE,)) if t.value != PENALTY]
    return min(good, key=lambda trial: trial.value or 0.0, default=None)


def write_results(search: Search, study: optuna.Study, out: Path) -> None:
    """Write every trial as CSV, and the best one's configuration for `ris-model train`."""
    trials = study.get_trials()
    names = sorted({name for trial in trials for name in trial.params})
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["trial", "state", "value", "epochs", "reason", *names])
    for trial in trials:
        start = [
            trial.number,
            trial.state.name.lower(),
            trial.value,
            len(trial.intermediate_values),
        ]
        reason = trial.user_attrs.get("reason", "")
        writer.writerow([*start, reason, *(trial.params.get(name, "") for name in names)])
    write_whole(out / "trials.csv", text.getvalue().encode())
    best = find_best(study)
    if best is not None:
        chosen: Any = optuna.trial.FixedTrial(best.params)
        config = draw_config(search.config, search.rows, chosen)
        write_whole(out / "best.json", json.dumps(asdict(config), indent=1).encode())
