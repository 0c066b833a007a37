"""Torch's own calls, led to whoever watches in their thread; as they were once nobody does.

The engine and the gradient scalers have no hooks that all backwards or all scalers pass. Their
functions are wrapped while a block is open in any thread, and do what they always did elsewhere.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch

_graph_task: Callable[[], int] = torch._C._current_graph_task_id  # noqa: SLF001 - no public name


def is_in_engine() -> bool:
    """Whether a backward is running in this thread."""
    return _graph_task() != -1


class Watcher(Protocol):
    """Who is asked instead of torch; each is given the call as it stood."""

    is_listening: bool

    def backward(
        self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run the engine."""

    def scale(
        self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Scale a loss."""

    def step(
        self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Have a scaler step an optimizer."""

    def update(
        self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Have a scaler choose its next scale."""


class Wires:
    """What is wrapped, and who watches in which thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._here = threading.local()
        self._watchers: list[Watcher] = []
        self._laid: list[tuple[Any, str, Any, Any]] = []

    @property
    def own(self) -> Watcher | None:
        """Who watches in this very thread."""
        watcher: Watcher | None = getattr(self._here, "watcher", None)
        return watcher

    @contextlib.contextmanager
    def led_to(self, watcher: Watcher) -> Iterator[None]:
        """Lead the calls of this thread to a watcher."""
        with self._lock:
            if not self._watchers:
                self._lay()
            self._watchers.append(watcher)
        outer = self.own
        self._here.watcher = watcher
        try:
            yield
        finally:
            self._here.watcher = outer
            with self._lock:
                self._watchers.remove(watcher)
                if not self._watchers:
                    self._remove()

    def _current(self) -> Watcher | None:
        watcher = self.own
        if watcher is None and len(self._watchers) == 1 and is_in_engine():
            watcher = self._watchers[0]  # on a device, the engine works in threads of its own
        return watcher if watcher is not None and watcher.is_listening else None

    def _lay(self) -> None:
        ends: list[tuple[Any, str, str]] = [(torch.autograd, "_engine_run_backward", "backward")]
        for kind in _family(torch.amp.GradScaler):
            ends += [(kind, name, name) for name in ("scale", "step", "update")]
        for owner, name, method in ends:
            original = vars(owner).get(name)
            if original is not None:
                wrapper = self._wrapped(original, method)
                setattr(owner, name, wrapper)
                self._laid.append((owner, name, original, wrapper))

    def _remove(self) -> None:
        for owner, name, original, wrapper in self._laid:
            # What somebody else has wrapped meanwhile is theirs; ours inside of it only passes on.
            if vars(owner).get(name) is wrapper:
                setattr(owner, name, original)
        self._laid.clear()

    def _wrapped(self, original: Callable[..., Any], method: str) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            watcher = self._current()
            if watcher is None:
                return original(*args, **kwargs)
            return getattr(watcher, method)(original, args, kwargs)

        return call


def _family(kind: type[Any]) -> list[type[Any]]:
    """A class and everything that inherits from it."""
    found = [kind]
    for one in found:
        found.extend(heir for heir in one.__subclasses__() if heir not in found)
    return found


WIRES = Wires()
