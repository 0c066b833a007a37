"""The company: the other processes of a program that `torchrun` started, seen from one of them.

One that has found something waits for what the others found at the same backward, or for their word
that they have passed it, so that there is one report, which names the rank that made the value.
"""

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from nanhunt import measurement, processes, store
from nanhunt.analysis import merge_ranks
from nanhunt.errors import NanhuntError
from nanhunt.launch.gradients import are_finite
from nanhunt.recorder import unrecorded
from nanhunt.records import Report

# Seconds in which the others are to answer: they come from the same communication, or go there.
PATIENCE = 60.0
_PASSED = "nanhunt/run/passed"
_FOUND = "nanhunt/run/found"
_TOLD = "nanhunt/run/told"


class Company:
    """The other processes; with one process nothing of this does anything.

    A backward has two marks that one can pass: its loss is finite, its gradients are.
    """

    def __init__(self) -> None:
        self._passed = (0, 0)  # the number of a backward, and how many of its marks were passed
        self._teller = 0

    @property
    def is_there(self) -> bool:
        """Whether there are others."""
        return processes.are_several()

    def note_loss(self, backward: int, losses: Sequence[Tensor]) -> None:
        """Tell the others if the losses of a backward are finite here."""
        self._note((backward, 1), losses)

    def note_gradients(self, backward: int, gradients: Sequence[Tensor]) -> None:
        """Tell the others if the gradients that a backward has left are finite here."""
        self._note((backward, 2), gradients)

    def _note(self, mark: tuple[int, int], values: Sequence[Tensor]) -> None:
        if self.is_there and mark > self._passed and are_finite(values):
            self._passed = mark
            processes.write_down(_PASSED, f"{mark[0]} {mark[1]}")

    def merge(self, report: Report, backward: int) -> Report:
        """One report of all that found something at this backward."""
        key = f"{_FOUND}/{backward}"
        # Who is about to fail at a mark asks for it only: the others cannot go further without us.
        asked = (backward, 1 if self._passed < (backward, 1) else 2)
        processes.write_down(key, store.dump(report))
        excused: set[int] = set()

        def is_past(rank: int) -> bool:
            said = processes.read(_PASSED, rank)
            if said is not None and tuple(map(int, said.split())) >= asked:
                excused.add(rank)
            return rank in excused

        found = {processes.rank_here(): report}
        for rank, text in processes.gather(key, PATIENCE, is_past).items():
            with contextlib.suppress(NanhuntError):
                found[rank] = store.parse(text, origin=f"the report of rank {rank}")
        self._teller = min(found)
        return merge_ranks(found, distributed.get_world_size(), finite=excused - found.keys())

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
