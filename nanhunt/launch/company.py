"""The company: the other processes of a program that `torchrun` started, seen from one of them.

One that has found something waits for what the others found at the same backward, or for their word
that they have passed it, so that there is one report, which names the rank that made the value.
"""

import contextlib
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from nanhunt import measurement, processes, store
from nanhunt.analysis import merge_ranks
from nanhunt.recorder import unrecorded
from nanhunt.records import RankState, Report

# Seconds in which the others are to answer: they come from the same communication, or go there.
PATIENCE = 60.0
_PASSED = "nanhunt/run/passed"
_FOUND = "nanhunt/run/found"
_TOLD = "nanhunt/run/told"


class Company:
    """The other processes; with one process nothing of this does anything.

    A backward has two marks that a process comes by: its losses and the gradients that it leaves.
    """

    def __init__(self) -> None:
        self._passed = _Mark(0, 0, 0)
        self._teller = 0
        self._silent: dict[int, _Mark] = {}  # who did not answer, and where it was last heard of

    @property
    def is_there(self) -> bool:
        """Whether there are others."""
        return processes.are_several()

    def note_loss(self, backward: int) -> None:
        """The losses of a backward are finite here; others may wait to hear it."""
        self._note(_Mark(backward, 1, self._passed.bad))

    def note_gradients(self, backward: int, *, is_bad: bool) -> None:
        """Its gradients are here; to be said of bad ones once what was found is told."""
        self._note(_Mark(backward, 2, backward if is_bad else self._passed.bad))

    def _note(self, mark: "_Mark") -> None:
        if self.is_there and mark > self._passed:
            self._passed = mark
            processes.write_down(_PASSED, " ".join(map(str, mark)))

    def merge(self, report: Report, backward: int) -> Report:
        """One report of all that found something at this backward."""
        if not self.is_there:
            return report
        key = f"{_FOUND}/{backward}"
        processes.write_down(key, store.dump(report))
        # Who fails at its loss asks for losses only: the others cannot go further without it.
        asked = (backward, 1 if _is_of_loss(report) else 2)
        passed: dict[int, _Mark] = {}

        def is_excused(rank: int) -> bool:
            mark = _read_mark(rank)
            if mark[:2] >= asked:
                passed[rank] = mark
            # Who was waited for in vain is not waited for again until it says something.
            return rank in passed or self._silent.get(rank) == mark

        texts = processes.gather(key, PATIENCE, is_excused)
        found = {processes.rank_here(): report} | store.parse_ranks(texts)
        everybody = set(range(distributed.get_world_size()))
        silent = everybody - found.keys() - passed.keys()
        self._silent = {rank: _read_mark(rank) for rank in silent}
        states: dict[int, RankState] = {
            rank: "finite" if mark.bad < backward else "unexplained"
            for rank, mark in passed.items()
        }
        merged = merge_ranks(found, len(everybody), states)
        # Who failed at its loss has told so before the others failed at their gradients.
        first = merged.rank or 0
        has_told = processes.read(f"{_TOLD}/{backward}", first) is not None
        self._teller = first if has_told else min(found)
        return merged

    @property
    def tells(self) -> bool:
        """Whether it is this process that tells the merged report."""
        return not self.is_there or self._teller == processes.rank_here()

    def end_telling(self, backward: int) -> None:
        """Return once the report is told: when one process ends, `torchrun` ends the others."""
        if not self.is_there:
            return
        key = f"{_TOLD}/{backward}"
        if self.tells:
            processes.write_down(key, "told")
        else:
            processes.gather(key, PATIENCE, lambda rank: rank != self._teller)

    def agree(self, parameters: Iterable[Tensor], *, is_bad: bool) -> bool:
        """Whether somebody who steps other parts of the same parameters has bad gradients.

        Copies need not be asked about: each process has all of their gradients.
        """
        spread: list[Any] = [p for p in parameters if measurement.is_distributed(p)]
        if not self.is_there or not spread:
            return is_bad
        meshes = dict.fromkeys(parameter.device_mesh for parameter in spread)
        groups = dict.fromkeys(group for mesh in meshes for group in mesh.get_all_groups())
        alarm = torch.tensor(float(is_bad), device=spread[0].device_mesh.device_type)
        with contextlib.suppress(RuntimeError), unrecorded():  # the others may be gone
            for group in groups:
                processes.agree(alarm, group)
        return bool(alarm.item())


class _Mark(NamedTuple):
    """How far a process has come."""

    backward: int  # its number, from 1
    passed: int  # of its marks
    bad: int  # the last backward whose gradients were not finite


def _read_mark(rank: int) -> _Mark:
    said = processes.read(_PASSED, rank)
    return _Mark(*map(int, said.split())) if said else _Mark(0, 0, 0)


def _is_of_loss(report: Report) -> bool:
    """Whether it was found before the backward."""
    seen = report.native
    return seen is not None and not seen.groups and not math.isfinite(seen.loss)
