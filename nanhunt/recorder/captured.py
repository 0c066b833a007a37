"""The operands of chosen ops of one replay, copied before the op runs, bits and layout alike.

Of an op that makes an autograd node, the gradients that come back to the node are copied as well:
a hook is put on the node once it hangs on the op's output, which is when the next op comes.
"""

import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nanhunt import measurement
from nanhunt.recorder.schema import op_info, tensors_in
from nanhunt.recorder.threads import node_of

Execute: TypeAlias = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Any]

# Private names of torch that this stands on; checked with the versions in pyproject.toml.
_sequence_number: Callable[[], int] = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]  # noqa: SLF001
_flip_sign: Callable[[Tensor], Tensor] = torch._neg_view  # noqa: SLF001
_below_modes: Callable[[], Any] = torch._C._DisableTorchDispatch  # noqa: SLF001

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


class CapturedCall(NamedTuple):
    """One op as it was called, with its operands as they were before it ran.

    `generator` is the state of the random generator that an op which draws was to draw from.
    Where the operands have no memory that could be copied `unfit` says so, and there are none.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    generator: Tensor | None = None
    unfit: str = ""


class Captured:
    """The calls of a replay whose events were asked for, by index.

    `incoming` are the gradients that came to the node which the call made, one for each of its
    outputs (None where nothing came). Once the last of the calls has run they stay as they are: a
    node may run again, and what counts is what that call met.
    """

    def __init__(self, wanted: frozenset[int], execute: Execute) -> None:
        self._wanted, self._execute = wanted, execute
        self._count = itertools.count()
        self._pending: tuple[int, list[weakref.ref[Tensor]], int] | None = None
        self._handles: list[Any] = []
        self._is_over = False
        self.calls: dict[int, CapturedCall] = {}
        self.incoming: dict[int, tuple[Tensor | None, ...]] = {}

    def execute(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the next op, copying first what it is given if it is one of those asked for."""
        if self._pending is not None:
            self._watch_node()
        index = next(self._count)
        if index not in self._wanted:
            return self._execute(func, args, kwargs)
        self.calls[index] = _captured(func, args, kwargs)
        self._is_over = len(self.calls) == len(self._wanted)
        number = _sequence_number() - 1
        returned = self._execute(func, args, kwargs)
        outputs = tensors_in(returned if isinstance(returned, (list, tuple)) else (returned,))
        self._pending = index, [weakref.ref(tensor) for tensor in outputs], number
        return returned

    def close(self) -> None:
        """Take the hooks off the nodes, which the program may keep."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._pending = None

    def _watch_node(self) -> None:
        """Put a hook on the node that the captured op before has made."""
        index, references, number = self._pending or (0, [], 0)
        self._pending = None
        for reference in references:
            node, _ = node_of(reference(), is_written=False)
            if node is not None and node._sequence_nr() == number:  # noqa: SLF001 - no public name
                arrived = functools.partial(self._arrived, index)
                self._handles.append(node.register_prehook(arrived))
                return

    def _arrived(self, index: int, gradients: tuple[Tensor | None, ...]) -> None:
        if self._is_over or any(g is not None and unfit(g) for g in gradients):
            return
        with _below_modes(), torch.no_grad():
            self.incoming[index] = copied(gradients)


def _captured(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CapturedCall:
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    reason = next(filter(None, map(unfit, leaves)), "")
    if reason:
        return CapturedCall(func, (), {}, unfit=reason)
    with _below_modes(), torch.no_grad():
        args, kwargs = copied((args, dict(kwargs)))
        for old, new in zip(leaves, tensors_of(args, kwargs), strict=True):
            new.requires_grad_(old.requires_grad)
        return CapturedCall(func, args, kwargs, _generator_of(func, leaves))


def _generator_of(func: Any, leaves: list[Tensor]) -> Tensor | None:
    """The state of the generator that an op draws from by default."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return None
    device = next((t.device for t in leaves if t.device.type == "cuda"), None)
    return torch.get_rng_state() if device is None else torch.cuda.get_rng_state(device)


def tensors_of(*values: Any) -> Iterator[Tensor]:
    """Every tensor in some arguments, as often as it stands there."""
    return (leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))


def unfit(tensor: Tensor) -> str:
    """Why the values of a tensor cannot be copied byte by byte; empty where they can."""
    if type(tensor) not in _PLAIN:
        return f"an operand is a {type(tensor).__name__}"
    if not measurement.has_values(tensor) or tensor.is_quantized:
        return "an operand has no numbers of its own"
    if tensor.layout not in (torch.strided, torch.sparse_coo, *_COMPRESSED):
        return f"an operand has the layout {tensor.layout}"
    return ""


_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


# -- copies that keep strides and aliases ----------------------------------------------------------


class Layout(NamedTuple):
    """How a strided tensor looks at its memory."""

    storage: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    is_conj: bool
    is_neg: bool

    @property
    def end(self) -> int:
        """The element of the memory behind the last one that is looked at."""
        reach = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return self.offset + (reach + 1 if 0 not in self.shape else 0)


def layout_of(tensor: Tensor) -> Layout:
    """The layout of a strided tensor."""
    return Layout(
        tensor.untyped_storage()._cdata,  # noqa: SLF001 - no public name
        tensor.dtype,
        tuple(tensor.shape),
        tuple(tensor.stride()),
        int(tensor.storage_offset()),
        tensor.is_conj(),
        tensor.is_neg(),
    )


def memory_between(tensor: Tensor, start: int, end: int) -> Tensor:
    """A copy of some elements of the memory that a tensor looks at, as they stand there."""
    plain = tensor.detach()
    plain = plain.conj() if plain.is_conj() else plain
    plain = _flip_sign(plain) if plain.is_neg() else plain
    return plain.as_strided((end - start,), (1,), start).clone()


def laid(memory: Tensor, layout: Layout, start: int) -> Tensor:
    """A tensor that looks at a copied memory, which begins at element `start` of the original."""
    tensor = memory.as_strided(layout.shape, layout.stride, layout.offset - start)
    tensor = _flip_sign(tensor) if layout.is_neg else tensor
    return tensor.conj() if layout.is_conj else tensor


def copied(values: Any) -> Any:
    """Copies of all tensors in some arguments, with the same strides and the same aliases.

    Tensors that are one and the same view stay one; views of one memory look at one copy of it.
    """
    spans: dict[tuple[int, torch.dtype], tuple[int, int]] = {}
    for tensor in tensors_of(values):
        if tensor.layout is torch.strided:
            layout = layout_of(tensor)
            start, end = spans.get((layout.storage, layout.dtype), (layout.offset, layout.end))
            span = min(start, layout.offset), max(end, layout.end)
            spans[layout.storage, layout.dtype] = span
    memories: dict[tuple[int, torch.dtype], Tensor] = {}
    known: dict[object, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided or tensor._is_zerotensor():  # noqa: SLF001
            given = tensor.detach()
            key: object = id(tensor)
            if key not in known:
                is_zero = tensor._is_zerotensor()  # noqa: SLF001 - no public name
                known[key] = torch.zeros_like(given) if is_zero else given.clone()
        else:
            layout = layout_of(tensor)
            key = (layout, tensor.requires_grad)
            place = layout.storage, layout.dtype
            if place not in memories:
                memories[place] = memory_between(tensor, *spans[place])
            if key not in known:
                known[key] = laid(memories[place], layout, spans[place][0])
        return known[key].requires_grad_(tensor.requires_grad)

    return pytree.tree_map_only(Tensor, copy, values)


def is_mutating(func: Any) -> bool:
    """Whether an op writes to one of its arguments."""
    return bool(op_info(func).mutated)
