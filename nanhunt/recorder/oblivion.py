"""What a recorder of many steps lets go of, and what it keeps."""

import bisect
from collections.abc import Iterable

from nanhunt.recorder.entries import Entry
from nanhunt.recorder.flow import Flow

_ABOUT, _MADE, _MET = 2, 3, -1  # places in an entry


def let_go(flow: Flow, raw: list[Entry], before: int) -> None:
    """Drop the first events, save those behind a non-finite value that is still in use."""
    flow.is_settled()  # forgets memory that was given back
    if before <= 0:
        return
    alive = {source for poison in flow.poison.values() for source in poison.sources}
    kept = _with_origins(raw, _with_ancestors(raw, alive))
    left = [index for index in sorted(kept) if index < before]
    new = {index: position for position, index in enumerate(left)}
    new |= {index: index - before + len(left) for index in range(before, len(raw))}
    for key, poison in flow.poison.items():
        parts = (part._replace(source=new.get(part.source, part.source)) for part in poison.parts)
        flow.poison[key] = poison._replace(parts=tuple(parts))
    raw[:before] = [raw[index] for index in left]
    for met in (entry[_MET] for entry in raw):
        if met is not None:
            met.sources = tuple(
                tuple(new.get(s, s) for s in group if s < 0 or s in new) for group in met.sources
            )


def _with_ancestors(raw: list[Entry], events: Iterable[int]) -> set[int]:
    """The events, and all those from which their non-finite values come."""
    found: set[int] = set()
    queue = [index for index in events if index >= 0]
    while queue:
        index = queue.pop()
        if index not in found:
            found.add(index)
            met = raw[index][_MET]
            queue.extend(s for group in (met.sources if met else ()) for s in group if s >= 0)
    return found


def _with_origins(raw: list[Entry], events: set[int]) -> set[int]:
    """The events, and the forward ops behind those that ran in a backward."""
    running = (raw[index][_ABOUT][0] for index in events)
    nodes = [node for node in running if node[1] is not None]
    if not nodes:
        return events
    makers: dict[tuple[int, int], int] = {}  # each thread numbers its nodes from 0
    for index, entry in enumerate(raw):
        if entry[_MADE] is not None:
            makers.setdefault((entry[_ABOUT][-1], entry[_MADE]), index)
    numbers = sorted(makers)
    # As in the analysis: an in-place op on a view runs under a number that no forward event has.
    wanted = ((thread or 0, number) for _, number, thread in nodes)
    places = (bisect.bisect_right(numbers, made) for made in wanted)
    return events | {makers[numbers[place - 1]] for place in places if place}
