"""The block that is watched: a context manager, and a decorator."""

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Literal, ParamSpec, TypeVar

import torch
from torch import nn

from nanhunt.errors import NonFiniteError, UsageError
from nanhunt.guarding.allowing import Allowable, Allowed
from nanhunt.guarding.observer import Choice, Observer
from nanhunt.guarding.wires import WIRES
from nanhunt.records import Report

P = ParamSpec("P")
R = TypeVar("R")

_INNER = tuple(str(Path(file).parent) + os.sep for file in (torch.__file__, Path(__file__).parent))


def detect(
    model: nn.Module | None = None,
    *,
    stop: Literal["sink", "birth"] = "sink",
    on_culprit: Callable[[Report], object] | None = None,
    allow: Allowable | Iterable[Allowable] = (),
) -> "Block":
    """Watch a block of training code, and raise where a non-finite value matters.

    It stands where `torch.autograd.detect_anomaly()` stood::

        with nanhunt.detect():  # or @nanhunt.detect() above a function
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()

    A healthy block passes in silence, and computes what it would compute alone, to the bit. A
    block inside another one is watched by the same recorder; the inner one's arguments count.

    Args:
        model: what the paths of modules and parameters begin at. Without it they begin with the
            class of whichever module is called first.
        stop: `"sink"` raises at the loss, before its backward; at a gradient, at the end of the
            backward or, under a live `GradScaler`, once its step has judged; at a parameter after
            the step. `"birth"` raises inside of the very operation too, in the forward as well.
        on_culprit: is called with the report instead of raising; each culprit is told once.
        allow: modules or their paths, ops (`"log"`) and call sites (`"train.py:31"`); what is born
            there does not count.

    Returns:
        A context manager, which is a decorator too.

    Raises:
        UsageError: an argument means nothing here.
        NonFiniteError: from the user's own call inside the block; its text is the short report
            and its `report` the whole.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise UsageError(
            f"detect takes a module; got {type(model).__name__} (a decorator is written "
            f"@nanhunt.detect(), with parentheses)"
        )
    if stop not in ("sink", "birth"):
        raise UsageError(f"stop is 'sink' or 'birth'; got {stop!r}")
    if on_culprit is not None and not callable(on_culprit):
        raise UsageError(f"on_culprit takes a function; got {type(on_culprit).__name__}")
    allowed = Allowed(allow)
    if model is not None:
        allowed.check(model)
    return Block(Choice(model, stop, on_culprit, allowed))


class Block:
    """What `detect` returns; entered, it watches the thread until it is left."""

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        self._entered: list[contextlib.ExitStack] = []

    def __enter__(self) -> None:
        with contextlib.ExitStack() as stack:
            observer = WIRES.own
            if not isinstance(observer, Observer):
                observer = Observer()
                stack.enter_context(WIRES.led_to(observer))
                stack.enter_context(observer.on())
            stack.enter_context(observer.under(self._choice))
            self._entered.append(stack.pop_all())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._entered.pop().__exit__(kind, error, trace)
        finally:
            if isinstance(error, NonFiniteError):
                _end_at_the_user(error.__traceback__)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Watch every call of a function, each with a recorder of its own."""
        later = (
            inspect.iscoroutinefunction,
            inspect.isgeneratorfunction,
            inspect.isasyncgenfunction,
        )
        if any(is_such(function) for is_such in later):
            raise UsageError(
                f"{function.__qualname__} runs after its call has returned; put `with "
                f"nanhunt.detect():` inside of it"
            )

        @functools.wraps(function)
        def watched(*args: P.args, **kwargs: P.kwargs) -> R:
            with Block(self._choice):
                return function(*args, **kwargs)

        return watched


def _end_at_the_user(trace: TracebackType | None) -> None:
    """Cut our own frames and torch's off the end, so that a debugger stands in the user's line."""
    last = None
    step = trace
    while step is not None:
        if not step.tb_frame.f_code.co_filename.startswith(_INNER):
            last = step
        step = step.tb_next
    if last is not None:
        last.tb_next = None
