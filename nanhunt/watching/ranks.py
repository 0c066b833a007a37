"""Several processes that train one model: they skip together, and tell one report.

Under `DistributedDataParallel` each process replays its own part alone, with the communication of
the wrapper switched off, so that no replay waits for another process, not even for one that died.
A model that communicates in its forward (`fully_shard`, `SyncBatchNorm`, tensors distributed over
processes) can be replayed by all together only: each takes the same one replay then.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, distributed, nn

from nanhunt import store
from nanhunt.analysis import merge_ranks
from nanhunt.measurement import is_distributed
from nanhunt.processes import are_several, gather, rank_here, write_down
from nanhunt.records import Report

PATIENCE = 60.0  # seconds in which all are to have told their reports
_numbers = itertools.count()


class Ranks:
    """The processes around one watch; with one process nothing of this does anything."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._number = next(_numbers)  # the same in all of them: they run the same program
        self._asked = 0

    @property
    def must_replay_together(self) -> bool:
        """Whether the forward of the model waits for the other processes."""
        return are_several() and (
            any(map(is_distributed, self._model.parameters()))
            or any(isinstance(m, nn.SyncBatchNorm) for m in self._model.modules())
        )

    @contextlib.contextmanager
    def apart(self, others: Iterable[nn.Module] = ()) -> Iterator[None]:
        """Switch off the communication of every `DistributedDataParallel` that is in sight."""
        if not are_several() or self.must_replay_together:
            yield
            return
        kind = nn.parallel.DistributedDataParallel
        roots = (self._model, *others)
        wrappers = {m for root in roots for m in root.modules() if isinstance(m, kind)}
        flags = ("require_backward_grad_sync", "require_forward_param_sync")
        before = [(m, flag, getattr(m, flag)) for m in wrappers for flag in flags]
        try:
            for wrapper, flag, _ in before:
                setattr(wrapper, flag, False)
            yield
        finally:
            for wrapper, flag, value in before:
                setattr(wrapper, flag, value)

    def merge(self, report: Report) -> Report:
        """One report of those of all processes that answer in time; the same one in each."""
        if not are_several():
            return report
        self._asked += 1
        key = f"nanhunt/{self._number}/{self._asked}"
        write_down(key, store.dump(report))
        found = {rank_here(): report} | store.parse_ranks(gather(key, PATIENCE))
        return merge_ranks(found, distributed.get_world_size())


@torch.no_grad()
def total_norms(norms: Sequence[Tensor]) -> Tensor:
    """Norms over all processes, of norms of parts: the square root of the sum of the squares."""
    squares = torch.stack(list(norms)).square()
    distributed.all_reduce(squares)
    return squares.sqrt()
