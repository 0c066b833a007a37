"""The look at what is on a device: noted there, op by op, and read once at the next station."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from nanhunt import measurement
from nanhunt.recorder import screen
from nanhunt.recorder.passing import unrecorded
from nanhunt.recorder.screen import Look, Shortcut


def is_far(tensor: Tensor) -> bool:
    """Whether reading a number of a tensor has to wait until a device has computed it."""
    return not tensor.is_cpu


class Deferred(Look):
    """Takes what is on a device to be finite, and tells later whether it was.

    To read one number after every op would make the program wait for the device as often. So of
    what an op left there one sum is taken, which is finite only if all of it is, and stays there
    too. Nothing that a recorder noted counts before `holds` has said so: if it was told something
    wrong, births and data flow are missing, and the step is to be recorded again without this.
    An infinity that the program writes down is no surprise, and is looked for at once.
    """

    @staticmethod
    def concerns(tensors: Iterable[Tensor]) -> bool:
        """Whether there is anything to wait for."""
        return any(map(is_far, tensors))

    def __init__(self) -> None:
        self._sums: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        self._has_held = True

    def is_cleared(
        self,
        shortcut: Shortcut | None,
        args: tuple[Any, ...],
        returned: Any,
        outputs: list[Tensor] | None,
    ) -> bool:
        """True of what is on a device, for now; of all else, whether it is known to be finite."""
        found = [returned] if outputs is None else outputs
        if not any(map(is_far, found)) or _are_infinite(args):
            return screen.is_cleared(shortcut, args, returned, outputs)
        self._note(tensor for tensor in found if is_far(tensor))
        return screen.are_clear([tensor for tensor in found if not is_far(tensor)])

    def is_clear_at_first(self, args: tuple[Any, ...]) -> bool:
        """The same of what an op is about to write to."""
        if not args or not isinstance(args[0], Tensor) or not is_far(args[0]):
            return screen.is_clear_at_first(args)
        self._note(args[:1])
        return True

    def holds(self) -> bool:
        """Whether all that was taken to be finite so far was; waits for the devices, once each."""
        with unrecorded(), torch.no_grad():
            # Sums of a stream that the program made itself may still be on their way.
            accelerator = torch.accelerator.current_accelerator()
            for device in {device for device, _ in self._sums}:
                if accelerator is not None and device.type == accelerator.type:
                    torch.accelerator.synchronize(device)
            totals = [float(torch.stack(sums).sum()) for sums in self._sums.values()]
        self._sums.clear()
        self._has_held &= all(total - total == 0.0 for total in totals)
        return self._has_held

    def _note(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            total = measurement.total(tensor)
            if total is not None:
                self._sums.setdefault((total.device, total.dtype), []).append(total)


def _are_infinite(args: tuple[Any, ...]) -> bool:
    """Whether an infinity or a NaN is written down among the arguments."""
    return any(isinstance(value, float) and value - value != 0.0 for value in args)
