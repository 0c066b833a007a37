"""Copies of the floating buffers of a program's modules, from the last step that was good.

A forward that goes wrong leaves its mark on running statistics; if only its gradients were thrown
away, everything after it would be non-finite because of them.
"""

import gc
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from nanhunt.launch.gradients import bad_among
from nanhunt.recorder import unrecorded

# Larger ones are copied only when something was written to them: constants, as a rule. torch's
# batch norm writes to its statistics unseen by the counter of writes, but they are small.
_SMALL = 1 << 18
LIMIT = 1 << 29  # bytes of copies


class Buffers:
    """Finds the modules that have such buffers, copies them, and puts the copies back."""

    def __init__(self) -> None:
        self._modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._copies: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[Tensor, int]]]
        self._copies = weakref.WeakKeyDictionary()
        self._trained: set[int] = set()
        self._bytes = 0
        self.left_out = 0  # buffers without a copy: there are too many

    def find(self, parameters: Sequence[Tensor]) -> None:
        """Look for modules through the whole process; these parameters are being trained.

        Modules come into being in ways that no hook of theirs tells (copied, unpickled), so the
        garbage collector is asked, once for each optimizer.
        """
        self._trained.update(map(id, parameters))
        for thing in gc.get_objects():
            kind = type(thing)  # not isinstance, which asks an object that stands for another
            if issubclass(kind, nn.Module) and any(True for _ in _floating(thing)):
                self._modules.add(thing)
        self.keep()

    def keep(self) -> None:
        """Copy what there is now."""
        if not self._modules:
            return
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        with unrecorded(), torch.no_grad():
            for module in self._modules:
                copies = self._copies.get(module)
                if copies is None:
                    copies = self._copies[module] = {}
                for name, buffer in _floating(module):
                    kept = copies.get(name)
                    if kept is None or not _is_alike(kept[0], buffer):
                        self._clone(copies, name, buffer)
                    elif buffer.numel() < _SMALL or kept[1] != buffer._version:  # noqa: SLF001
                        targets.append(kept[0])
                        sources.append(buffer)
                        copies[name] = (kept[0], buffer._version)  # noqa: SLF001
            if targets:
                torch._foreach_copy_(targets, sources)

    def restore(self) -> int:
        """Put the copies back; the number of buffers that are other than they were.

        Those of modules that are not trained themselves (averages of the parameters, say) are left
        alone unless they are non-finite: the program may have changed them after the step.
        """
        restored = 0
        with unrecorded(), torch.no_grad():
            for module in self._modules:
                copies = self._copies.get(module, {})
                for name, buffer in _floating(module):
                    kept = copies.get(name)
                    if kept is None or not _is_alike(kept[0], buffer) or bad_among([kept[0]]):
                        continue
                    is_ours = self._is_trained(module) or bool(bad_among([buffer]))
                    if is_ours and not torch.equal(kept[0], buffer):
                        buffer.copy_(kept[0])
                        restored += 1
        return restored

    def _is_trained(self, module: nn.Module) -> bool:
        return any(id(parameter) in self._trained for parameter in module._parameters.values())  # noqa: SLF001

    def _clone(self, copies: dict[str, tuple[Tensor, int]], name: str, buffer: Tensor) -> None:
        size = buffer.numel() * buffer.element_size()
        if self._bytes + size > LIMIT:
            self.left_out += 1
            return
        self._bytes += size
        copies[name] = (buffer.detach().clone(), buffer._version)  # noqa: SLF001


def _floating(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in vars(module).get("_buffers", {}).items():
        if (
            type(buffer) is Tensor
            and buffer.is_floating_point()
            and buffer.layout is torch.strided
            and not buffer.is_meta
        ):
            yield name, buffer


def _is_alike(kept: Tensor, buffer: Tensor) -> bool:
    def kind(tensor: Tensor) -> object:
        return tensor.shape, tensor.dtype, tensor.device

    return kind(kept) == kind(buffer)
