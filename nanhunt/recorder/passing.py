"""What passes the modules: their outputs, and the gradients that arrive at these."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _pop_mode, _push_mode

from nanhunt import measurement
from nanhunt.records import Passage

# Private names of torch that this stands on; checked with the versions in pyproject.toml.
_is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor  # noqa: SLF001
_depth: Callable[[], int] = torch._C._len_torch_dispatch_stack  # noqa: SLF001
_unwrap: Callable[[Tensor], Tensor] = torch._C._functorch.get_unwrapped  # noqa: SLF001


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Measure below every dispatch mode: neither recorded nor changed by an intervention.

    Tensors that are made of others keep their own dispatch, without which reading one ends the
    process.
    """
    modes = [_pop_mode() for _ in range(_depth())]
    try:
        yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor with memory below the wrappers of `torch.func`'s transforms."""
    while _is_wrapped(tensor):
        tensor = _unwrap(tensor)
    return tensor


class Passing:
    """Measures what modules return, and the gradients when they arrive there."""

    def __init__(self) -> None:
        self.passages: list[Passage] = []
        self._handles: list[Any] = []

    def watch(self, module: str, returned: Iterable[Tensor]) -> None:
        """Measure what one module returned, and wait for the gradient."""
        for tensor in returned:
            with unrecorded():
                self._note(measurement.read_passage(module, "forward", tensor))
            if tensor.requires_grad:
                arrived = functools.partial(self._gradient_arrived, module)
                self._handles.append(tensor.register_hook(arrived))

    def close(self) -> None:
        """Wait no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _gradient_arrived(self, module: str, gradient: Tensor) -> None:
        with unrecorded():
            self._note(measurement.read_passage(module, "backward", gradient))

    def _note(self, passage: Passage | None) -> None:
        if passage is not None:
            self.passages.append(passage)
