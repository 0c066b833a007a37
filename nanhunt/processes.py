"""The processes that train one model together: how many they are, and what they tell each other.

What each writes down for the others goes through the key-value store of their process group, which
nobody has to wait in: a process that died leaves the others' words where they are.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor, distributed

_PAUSE = 0.02  # seconds between two looks at what the others have written


def are_several() -> bool:
    """Whether this process trains together with others."""
    is_on = distributed.is_available() and distributed.is_initialized()
    return is_on and distributed.get_world_size() > 1


def rank_here() -> int:
    """The number of this process."""
    return distributed.get_rank() if are_several() else 0


def agree(alarm: Tensor, group: Any = None) -> Tensor:
    """The largest of all processes' numbers, or of those of a group; all of them have to ask."""
    distributed.all_reduce(alarm, distributed.ReduceOp.MAX, group=group)
    return alarm


def write_down(key: str, text: str) -> None:
    """Leave a text of this process for the others, over the last one under the key."""
    with contextlib.suppress(RuntimeError):  # the store itself is gone
        _store().set(f"{key}/{rank_here()}", text)


def read(key: str, rank: int) -> str | None:
    """What a process has left under a key; None: nothing yet, or the store is gone."""
    with contextlib.suppress(RuntimeError):
        return _read(key, rank)
    return None


def _read(key: str, rank: int) -> str | None:
    name = f"{key}/{rank}"
    store = _store()
    return str(store.get(name).decode("utf-8")) if store.check([name]) else None


def gather(
    key: str,
    patience: float,
    is_excused: Callable[[int], bool] = lambda _rank: False,
) -> dict[int, str]:
    """The texts under a key of all processes, by rank; of those that have written one in time.

    Args:
        key: under which each writes its own.
        patience: seconds in which all are to have written it.
        is_excused: whether a process, by its rank, need not be waited for any longer.
    """
    end = time.monotonic() + patience
    found: dict[int, str] = {}
    silent = list(range(distributed.get_world_size()))
    with contextlib.suppress(RuntimeError):  # the store is gone, and with it what was to come
        while silent and time.monotonic() < end:
            for rank in tuple(silent):
                text = _read(key, rank)
                if text is not None:
                    found[rank] = text
                if text is not None or is_excused(rank):
                    silent.remove(rank)
            if silent:
                time.sleep(_PAUSE)
    return found


def _store() -> Any:
    store = distributed.distributed_c10d._get_default_store()  # noqa: SLF001 - no public name
    if store is None:  # as MPI has none
        raise RuntimeError("the process group has no store")
    return store
