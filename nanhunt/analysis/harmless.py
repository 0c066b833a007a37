"""The non-finite values that reached no sink: where they were made, and where they ended."""

from collections.abc import Mapping

from nanhunt.analysis.origins import Origins
from nanhunt.analysis.walk import walk_back
from nanhunt.causes import base_name
from nanhunt.places import readable_path
from nanhunt.records import Frame, OpEvent, Trace


def tell_harmless(trace: Trace) -> tuple[str, ...]:
    """One line for each line of code whose non-finite values harmed nobody, in order of time.

    Infinities that were asked for, as a mask is, are told as well.
    """
    walk = walk_back(trace)
    visited = walk.visited if walk else frozenset()
    readers = _readers(trace)
    origins = Origins(trace)
    lines: dict[object, list[OpEvent]] = {}
    for event in trace.events:
        is_made = event.birth is not None or (event.asked and not event.parents)
        if is_made and not _reaches(event.index, readers, visited):
            origin = origins.of(event)
            lines.setdefault((event.op, origin.frame, event.asked), []).append(event)
    return tuple(
        _told(events, origins, _end(trace, events[0], readers)) for events in lines.values()
    )


def _readers(trace: Trace) -> Mapping[int, list[int]]:
    """For every event, those that read what it left."""
    readers: dict[int, list[int]] = {}
    for event in trace.events:
        for parent in event.parents:
            readers.setdefault(parent, []).append(event.index)
    return readers


def _reaches(index: int, readers: Mapping[int, list[int]], visited: frozenset[int]) -> bool:
    """Whether something that the walk back from the sinks met depends on an event."""
    seen, stack = set(), [index]
    while stack:
        current = stack.pop()
        if current in visited:
            return True
        if current not in seen:
            seen.add(current)
            stack.extend(readers.get(current, ()))
    return False


def _end(trace: Trace, event: OpEvent, readers: Mapping[int, list[int]]) -> OpEvent | None:
    """The first op that read the value and returned only finite ones; None if none did."""
    seen, queue = set(), [event.index]
    for current in queue:
        for reader in readers.get(current, ()):
            if trace.events[reader].is_finite:
                return trace.events[reader]
            if reader not in seen:
                seen.add(reader)
                queue.append(reader)
    return None


def _told(events: list[OpEvent], origins: Origins, end: OpEvent | None) -> str:
    first = events[0]
    count = sum(event.birth.count for event in events if event.birth)
    count = count or sum(f.nonfinite for event in events for f in event.outputs)
    kind = "asked for" if first.asked else first.birth.kind if first.birth else ""
    times = f", {len(events)} times" if len(events) > 1 else ""
    where = _place(origins.of(first).frame)
    fate = (
        f"ended in {base_name(end.op)}{_place(origins.of(end).frame)}" if end else "read by nobody"
    )
    return f"{base_name(first.op)}{where}{times}: {count} elements, {kind}; {fate}"


def _place(frame: Frame | None) -> str:
    return f" at {readable_path(frame.file)}:{frame.line}" if frame else ""
