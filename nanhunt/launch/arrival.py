"""The arrival of a module: something is done once the program itself has imported it.

A program may choose what torch does before it imports it (threads, devices, allocator), and one
that never imports it must not wait for it. So nothing here imports torch for it.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class Arrival(MetaPathFinder):
    """Stands first among the finders until the module has come."""

    def __init__(self, name: str, then: Callable[[], object]) -> None:
        self._name = name
        self._then = then
        self._is_looking = False

    def expect(self) -> None:
        """Wait for the module, or go on at once where it is there."""
        if self._name in sys.modules:
            self._then()
        else:
            sys.meta_path.insert(0, self)

    def forget(self) -> None:
        """Wait no longer."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
        /,
    ) -> ModuleSpec | None:
        """Let the others find the module, and be told when it has been executed."""
        del path, target
        if fullname != self._name or self._is_looking:
            return None
        self._is_looking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._is_looking = False
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Loader) -> None:
        execute = loader.exec_module

        def follow(module: ModuleType) -> None:
            del loader.exec_module  # the instance's own, over that of its class
            execute(module)
            self.forget()
            self._then()

        loader.exec_module = follow  # type: ignore[method-assign]
