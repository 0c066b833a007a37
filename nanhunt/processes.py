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
    """What another process has left under a key; None: nothing yet."""
    with contextlib.suppress(RuntimeError):
        if _store().check([f"{key}/{rank}"]):
            return str(_store().get(f"{key}/{rank}").decode("utf-8"))
    return None


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
    while True:
        for rank in tuple(silent):
            text = read(key, rank)
            if text is not None:
                found[rank] = text
            if text is not None or is_excused(rank):
                silent.remove(rank)
        if not silent or time.monotonic() > end:
            return found
        time.sleep(_PAUSE)


def _store() -> Any:
    return distributed.distributed_c10d._get_default_store()  # noqa: SLF001 - no public name
