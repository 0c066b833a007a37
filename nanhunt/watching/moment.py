"""The moment before a step: where the random generators and the buffers stood."""

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from nanhunt.generators import Generators, read_generators, set_generators
from nanhunt.measurement import suspects

Table: TypeAlias = dict[str, Tensor | None]


def tables_of(modules: Iterable[nn.Module]) -> list[Table]:
    """The tables of buffers of modules and of all that is inside of them, once each."""
    every = {id(m): m for outer in modules for m in outer.modules()}
    return [module._buffers for module in every.values()]  # noqa: SLF001 - they are set through it


class Moment:
    """Taken at each step, in memory that it keeps: one fused copy of all buffers."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self._tables = tables
        self._homes: list[Tensor] = []
        self._entries: list[tuple[Table, str, Tensor]] = []
        self._copies: list[tuple[list[Tensor], list[Tensor]]] = []
        self.generators: Generators | None = None

    def take(self) -> "Moment":
        """Note where everything stands now."""
        self.generators = read_generators()
        now = [t for table in self._tables for t in table.values() if t is not None]
        homes = self._homes
        if len(now) != len(homes) or any(a is not b for a, b in zip(now, homes, strict=True)):
            self._allocate(now)
        if not self._copies:
            return self
        try:
            self._copy()
        except RuntimeError:  # a buffer has another size by now
            self._allocate(now)
            self._copy()
        return self

    def _allocate(self, now: list[Tensor]) -> None:
        self._homes = now
        self._entries = [
            (table, name, t) for table in self._tables for name, t in table.items() if t is not None
        ]
        kinds: dict[object, list[Tensor]] = {}
        for tensor in {id(t): t for t in now}.values():
            if _is_written_to(tensor):
                kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        self._copies = [
            (like, [torch.empty_like(t, requires_grad=False) for t in like])
            for like in kinds.values()
        ]

    @torch.no_grad()
    def _copy(self) -> None:
        for homes, copies in self._copies:
            torch._foreach_copy_(copies, homes)

    def restore(self) -> None:
        """Put generators and buffers back: the same tensors with the same bits."""
        if self.generators is not None:
            set_generators(self.generators)
        self.restore_buffers()

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Put the buffers back."""
        for table, name, tensor in self._entries:
            if table.get(name) is not tensor:
                table[name] = tensor
        for homes, copies in self._copies:
            for home, copy in zip(homes, copies, strict=True):
                if home.shape != copy.shape:
                    home.resize_(copy.shape)
                home.copy_(copy)

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether what was noted of the buffers is finite, by the cheap screen."""
        return not any(suspects(copies) for _, copies in self._copies)

    @torch.no_grad()
    def are_buffers_finite(self) -> bool:
        """Whether the buffers are, now."""
        return not suspects([t for table in self._tables for t in table.values() if t is not None])


def _is_written_to(tensor: Tensor) -> bool:
    """Whether there is memory that a forward may write to; not where elements share theirs."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return False
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    return not any(stride == 0 and size > 1 for stride, size in pairs)
