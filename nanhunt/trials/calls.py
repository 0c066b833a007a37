"""Calls of torch by the user's code: which one an op was part of, and one of them replaced.

A `TorchFunctionMode` sees what the user calls, above autograd, with the caller's frame. Composites
written in Python (`F.normalize`, attention) arrive as one call; they are opened, so that the calls
inside of them are seen too.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from nanhunt.interventions import OwnCalls
from nanhunt.recorder import Place, Recorder, acting_here, call_path, carried_into_threads
from nanhunt.records import OpEvent

_TORCH_DIR = str(Path(torch.__file__).parent)
_OVERRIDES = torch.overrides.__file__


@dataclass(frozen=True, slots=True)
class Site:
    """One place in the code from which torch is called: the frames out to the user's line.

    A loop that comes there again calls from the same site.
    """

    name: str  # of what is called, without underscores and the in-place mark
    path: tuple[Place, ...] = field(compare=False)
    key: tuple[tuple[int, int], ...] = ()  # two code objects may be equal, so this goes by identity

    @property
    def line(self) -> Place:
        """The user's instruction."""
        return self.path[-1]

    @property
    def is_direct(self) -> bool:
        """Whether the user's own line makes the call, and not torch on its behalf."""
        return len(self.path) == 1


_NOWHERE = Site("", ())


class Call(NamedTuple):
    """One call as it arrives."""

    site: Site
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Running(threading.local):
    """The composites that are running, in each thread its own."""

    def __init__(self) -> None:
        self.composites: list[Callable[..., Any]] = []


class CallMode(OwnCalls):
    """Hands every call to `meet`, those inside of Python composites after the composite itself.

    Under a recorder it notes which ops each call was made of.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Site, int, int, int]] = []
        self._running = _Running()

    @contextlib.contextmanager
    def entered(self, _subject: object) -> Iterator[None]:
        """See the calls inside, those of threads that are started there among them."""
        with carried_into_threads(), self:
            yield

    def around(self, event: OpEvent) -> tuple[Site, ...]:
        """The calls that a recorded op was part of, the innermost first."""
        found = [
            (end - start, site)
            for site, start, end, thread in self._calls
            if start <= event.index < end and thread == event.thread
        ]
        return tuple(site for _, site in sorted(found, key=lambda pair: pair[0]))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "__get__") == "__get__":
            return func(*args, **(kwargs or {}))
        path = call_path()
        if path is None:  # the backward, say, in which the user's own functions run again
            return self.proceed(Call(_NOWHERE, func, args, kwargs or {}))
        path = _outside(func, path)
        name = func.__name__.strip("_")
        site = Site(name, path, tuple((id(code), offset) for code, offset in path))
        recorder = _recorder()
        start = recorder.position if recorder else 0
        try:
            return self.meet(Call(site, func, args, kwargs or {}))
        finally:
            if recorder and recorder.position > start:
                self._calls.append((site, start, recorder.position, recorder.thread))

    def meet(self, call: Call) -> Any:
        """What a call returns."""
        return self.proceed(call)

    def proceed(self, call: Call) -> Any:
        """Make the call as it is, and meet those inside of it."""
        inside = _opened(call.func)
        # A method of a Python subclass hands what its parent does to the mode under its own name.
        is_open = self._running.composites
        if inside is None or call.func in is_open:
            return call.func(*call.args, **call.kwargs)
        is_open.append(call.func)
        try:
            with self:
                return inside(*call.args, **call.kwargs)
        finally:
            is_open.pop()


def _outside(func: Callable[..., Any], path: tuple[Place, ...]) -> tuple[Place, ...]:
    """The calls without those in which a composite of torch asks whether a mode is there."""
    own = getattr(func, "__code__", None)
    first = 0
    while first < len(path) - 1:
        code = path[first][0]
        if code is not own and code.co_filename != _OVERRIDES:
            break
        first += 1
    return path[first:]


def _recorder() -> Recorder | None:
    modes = (*_get_current_dispatch_mode_stack(), *acting_here())
    return next((mode for mode in modes if isinstance(mode, Recorder)), None)


def _is_not_overridden(*_: Any) -> bool:
    return False


@functools.cache
def _opened(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """A composite of torch without the question that would hand it to the mode once more."""
    if not isinstance(func, FunctionType) or not func.__code__.co_filename.startswith(_TORCH_DIR):
        return None
    asks = [name for name in func.__code__.co_names if name.startswith("has_torch_function")]
    if not asks:
        return None
    names = {**func.__globals__, **dict.fromkeys(asks, _is_not_overridden)}
    opened = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    opened.__kwdefaults__ = func.__kwdefaults__
    return opened
