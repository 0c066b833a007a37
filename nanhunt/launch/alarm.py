"""The alarm: the recorder and its observer, switched on under a running program and off again."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nanhunt.guarding.allowing import Allowed
from nanhunt.guarding.observer import Choice, Observer
from nanhunt.guarding.wires import is_in_engine
from nanhunt.launch.caution import KEPT, CautiousRecorder
from nanhunt.records import Report

_depth: Callable[[], int] = torch._C._len_torch_dispatch_stack  # noqa: SLF001 - no public name
_top: Callable[[int], object] = torch._C._get_dispatch_stack_at  # noqa: SLF001 - no public name


class CautiousObserver(Observer):
    """An observer whose own failures do not reach the program."""

    def __init__(self, recorder: CautiousRecorder, give_up: Callable[[Exception], object]) -> None:
        super().__init__(recorder, kept=KEPT)
        recorder.observer = self
        self._give_up = give_up
        self.is_late = False  # the next step to end began unseen

    def _enter_root(self, module: nn.Module) -> None:
        try:
            super()._enter_root(module)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is not the program's
            self._give_up(error)

    def _stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self.is_late:
            self.is_late = False
            return
        try:
            super()._stepped(optimizer, args, kwargs)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is not the program's
            self._give_up(error)


class Alarm:
    """Is asked for the recorder, which comes at the next moment at which it can."""

    def __init__(
        self, on_culprit: Callable[[Report], object], give_up: Callable[[Exception], object]
    ) -> None:
        self._choice = Choice(None, "sink", on_culprit, Allowed(()))
        self._give_up = give_up
        self._stack: contextlib.ExitStack | None = None
        self._recorder: CautiousRecorder | None = None
        self._thread = 0
        self.is_wanted = False
        self.observer: CautiousObserver | None = None

    @property
    def is_on(self) -> bool:
        """Whether the recorder runs."""
        return self.observer is not None

    @property
    def steps(self) -> int:
        """Optimizer steps that were recorded."""
        return self._recorder.step if self._recorder is not None else 0

    def follow(self, *, amid_step: bool = False) -> None:
        """Switch on or off, as is wanted, where nothing stands in the way.

        The modes of the program itself must not come to lie between ours, and inside of the engine
        a mode would be gone with the backward. Not to be called from a hook of an optimizer: they
        are being gone through, and more would be added to them. `amid_step` tells that a step is
        not over yet that the recorder has not seen.
        """
        if self.is_wanted and self.observer is None:
            if _depth() == 0 and not is_in_engine():
                self._switch_on()
                if amid_step and self.observer is not None:
                    self.observer.is_late = True
        elif not self.is_wanted and self.observer is not None and self._is_on_top():
            self.leave()

    def silence(self) -> None:
        """Do nothing any more, at once; what can be taken away is taken away by `leave`."""
        self.is_wanted = False
        self.observer = None
        if self._recorder is not None:
            self._recorder.is_off = True
            self._recorder.on_root = None

    def leave(self) -> None:
        """Take everything away that can be."""
        is_on_top = self._is_on_top()
        self.silence()
        if is_on_top and self._stack is not None:
            stack, self._stack, self._recorder = self._stack, None, None
            stack.close()

    def _switch_on(self) -> None:
        recorder = CautiousRecorder(self._give_up)
        observer = CautiousObserver(recorder, self._give_up)
        with contextlib.ExitStack() as stack:
            stack.enter_context(observer.on())
            stack.enter_context(observer.under(self._choice))
            self._stack = stack.pop_all()
        self._recorder, self.observer = recorder, observer
        self._thread = threading.get_ident()

    def _is_on_top(self) -> bool:
        if self._recorder is None or threading.get_ident() != self._thread:
            return False
        depth = _depth()
        return depth > 0 and _top(depth - 1) is self._recorder and not is_in_engine()
