"""Does it come again: with fewer samples, and with which of them."""

from collections.abc import Callable, Sequence
from typing import Any

from nanhunt.errors import NanhuntError
from nanhunt.records import Sample
from nanhunt.replay import replay
from nanhunt.structure import count_samples, pick_samples, take_samples
from nanhunt.subject import Subject
from nanhunt.variants import NATIVE

_SHOWN = 12  # indices of samples that are written out


def try_sizes(
    subject: Subject, batch: Any, progress: Callable[[str], object]
) -> tuple[list[Sample], str]:
    """Replay a step with its first 1, 2, 4, … samples; the note says why that ended early."""
    count = count_samples(batch) or 0
    found: list[Sample] = []
    size = 1
    while size < count:
        progress(f"{size} of {count} samples")
        try:
            part = take_samples(batch, size, count)
            run = replay(subject, part, NATIVE, scope=None).run
        except NanhuntError as error:
            return found, f"{size} of {count} samples could not be replayed: {error}"
        found.append(Sample(size, run.is_finite))
        size *= 2
    return found, ""


def tell_samples(subject: Subject, batch: Any, progress: Callable[[str], object]) -> str:
    """Which samples of a failing batch fail alone, found by halving.

    Samples that are finite together are taken to be finite alone.
    """
    count = count_samples(batch) or 0

    def fails(indices: Sequence[int]) -> bool:
        progress(f"samples {indices[0]} to {indices[-1]} of {count}")
        part = pick_samples(batch, indices, count)
        return not replay(subject, part, NATIVE, scope=None).run.is_finite

    try:
        alone = find_failing(fails, count)
    except NanhuntError as error:
        return f"samples could not be replayed alone: {error}"
    if not alone:
        return f"no sample of {count} fails alone: they fail together"
    shown = ", ".join(map(str, alone[:_SHOWN])) + (", …" if len(alone) > _SHOWN else "")
    return f"{len(alone)} of {count} samples fail alone (replayed): {shown}"


def find_failing(fails: Callable[[Sequence[int]], bool], count: int) -> list[int]:
    """The indices below `count` that fail alone; a range that does not fail is not split."""
    alone: list[int] = []
    ranges = [range(count)]
    while ranges:
        here = ranges.pop()
        if len(here) < count and not fails(here):
            continue
        if len(here) == 1:
            alone.append(here[0])
            continue
        middle = len(here) // 2
        ranges += [here[middle:], here[:middle]]
    return alone
