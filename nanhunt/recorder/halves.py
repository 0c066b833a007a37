"""Ops of the loss that return half precision, found while a step runs without being recorded.

The loss is what runs in the forward outside of the model: an op belongs to the model when a method
of one of its modules is among its callers, whether that was called as a module or by its name.
"""

import sys
from collections import Counter
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from nanhunt.places import readable_frame
from nanhunt.recorder.frames import BOUNDARY, USER, Place, kind_of, read_frame
from nanhunt.recorder.schema import op_info
from nanhunt.records import HalfOp

_HALVES = (torch.float16, torch.bfloat16)
_NO_TASK = -1
_graph_task = torch._C._current_graph_task_id  # noqa: SLF001 - as in `mode`
# What moves numbers and computes none; the op that computes with them is the one to be named.
_MOVING = frozenset(
    ["aten::_to_copy", "aten::clone", "aten::copy_", "aten::lift_fresh", "aten::cat", "aten::stack"]
)


class LossHalves:
    """Is told of every op of a step; keeps those of the loss in half precision."""

    def __init__(self, model: nn.Module) -> None:
        self.ops = 0
        self._modules = {id(module) for module in model.modules()}
        self._seen: dict[Place, bool] = {}
        self._found: Counter[tuple[str, str, Place]] = Counter()

    def __call__(self, func: Any, output: Any) -> None:
        """Look at one op and what it returned."""
        if _graph_task() != _NO_TASK or not torch.is_grad_enabled():
            return
        first = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(first, Tensor) or not (first.is_floating_point() or first.is_complex()):
            return
        if first.dtype not in _HALVES:
            self.ops += self._is_of_loss()
            return
        place = self._place()
        if place is None:
            return
        self.ops += 1
        name = func._schema.name  # noqa: SLF001 - its public name
        if name not in _MOVING and not op_info(func).is_view:
            self._found[name, str(first.dtype).removeprefix("torch."), place] += 1

    def found(self) -> tuple[HalfOp, ...]:
        """Each op at each line, in the order of time."""
        return tuple(
            HalfOp(name, dtype, readable_frame(read_frame(*place)), times)
            for (name, dtype, place), times in self._found.items()
        )

    def _is_of_loss(self) -> bool:
        """Whether an op that is only counted is one of the loss, looked up once per line.

        A line that the model and the loss share counts as what it first was.
        """
        frame: FrameType | None = sys._getframe(2)  # noqa: SLF001 - as in `frames`
        while frame is not None:
            kind = kind_of(frame.f_code.co_filename)
            if kind == BOUNDARY:
                return False
            if kind == USER:
                spot = frame.f_code, frame.f_lasti
                known = self._seen.get(spot)
                if known is None:
                    known = self._seen[spot] = self._place_from(frame) is not None
                return known
            frame = frame.f_back
        return False

    def _place(self) -> Place | None:
        """The innermost line of the user under which an op runs; None inside the model."""
        return self._place_from(sys._getframe(2))  # noqa: SLF001 - as in `frames`

    def _place_from(self, frame: FrameType | None) -> Place | None:
        """The same, asked from a frame on."""
        place: Place | None = None
        while frame is not None:
            code = frame.f_code
            kind = kind_of(code.co_filename)
            if kind == BOUNDARY:
                return place
            if kind == USER and place is None:
                place = code, frame.f_lasti
            # A loss is given the model as its first argument too, which does not make it a method.
            if code.co_varnames[:1] == ("self",) and self._is_of_model(frame):
                return None
            frame = frame.f_back
        return place

    def _is_of_model(self, frame: FrameType) -> bool:
        """Whether a call is a method of one of the model's modules."""
        return id(frame.f_locals.get("self")) in self._modules
