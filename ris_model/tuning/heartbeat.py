"""Heartbeat: a journal file whose workers give signs of life, as those of a database do.

Optuna's own journal storage has none: the trial of a killed worker would be running for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from optuna import Study
from optuna.storages import JournalStorage
from optuna.storages import RetryHeartbeatStaleTrialCallback as Retry

# A private name of Optuna's: its loop asks a storage for these five methods by this class alone.
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

# Attribute of a trial that holds when its worker was last alive, seconds since 1970.
_ALIVE = "ris:alive"
# Intervals without a sign after which a worker is taken for lost.
_GRACE = 2


class LivingJournal(JournalStorage, BaseHeartbeat):
    """A journal file; a lost worker's trial fails and is made once more by another one.

    The signs are times of the workers' own clocks, which have to agree within the grace of two
    intervals where they run on several machines.
    """

    def __init__(self, path: str, *, heartbeat: int) -> None:
        super().__init__(JournalFileBackend(path))
        self._interval = heartbeat

    def record_heartbeat(self, trial_id: int) -> None:
        """Give a sign of life; Optuna does so from a thread while a trial runs."""
        self.set_trial_system_attr(trial_id, _ALIVE, time.time())

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        """Trials that run and of which nothing was heard for too long."""
        running = self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
        oldest = time.time() - _GRACE * self._interval
        # one without a sign has only just begun
        return [t._trial_id for t in running if t.system_attrs.get(_ALIVE, oldest) < oldest]  # noqa: SLF001  there is no public way to it

    def get_heartbeat_interval(self) -> int:
        """Seconds between two signs."""
        return self._interval

    def get_heartbeat_stale_trial_callback(self) -> Callable[[Study, FrozenTrial], None]:
        """Queue a lost trial once more."""
        return Retry(max_retry=1)
