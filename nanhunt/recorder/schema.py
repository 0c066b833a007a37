"""What the schema of an aten op says, looked up once per op."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from nanhunt.recorder.screen import Shortcut, shortcut_of

# Ops whose output is finite whenever their inputs are, or that hold no value yet. Views need no
# row: their schema tells. Of complex numbers abs overflows and tanh and sigmoid have poles.
# fmt: off
_CANNOT_MAKE = frozenset([
    "_unsafe_view", "clone", "cat", "stack", "index_select", "gather", "relu", "relu_",
    "threshold_backward", "sign", "neg", "embedding",
    "zero_", "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "rand",
    "rand_like", "randn", "randn_like", "bernoulli", "gt", "lt", "ge", "le", "eq", "ne",
    "argmax", "argmin", "select_backward", "slice_backward", "bernoulli_",
    "max_pool2d_with_indices",
])
# fmt: on
_OVERWRITES = frozenset(["copy_", "fill_", "zero_"])
_SELF = ((0, "self"),)
_UNINITIALISED = frozenset(
    ["empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"]
)


# What these write to in training although their schemas do not say so.
_RUNNING = ((3, "running_mean"), (4, "running_var"))
_WRITES_UNSAID = {
    "native_batch_norm": _RUNNING, "cudnn_batch_norm": _RUNNING, "miopen_batch_norm": _RUNNING,
}  # fmt: skip


class OpInfo(NamedTuple):
    """What is worth knowing about one op overload before it runs.

    `mutated` are the positions and names of the arguments that it writes to. `is_fresh` means that
    its outputs own new memory, `is_view` that they only look at an input's, `is_update` that it
    reads the elements that it overwrites, `is_collective` that it exchanges tensors with other
    ranks; the outputs of such an op are always followed. `is_single` means that all it writes to is
    what it returns, where that is one tensor. `unread` are the positions, among its tensors, of
    those that it writes to from end to end without reading them. `shortcut` may tell sooner than a
    look at them that its outputs are finite.
    """

    func: Any
    call: Any
    name: str
    is_view: bool
    is_fresh: bool
    is_screened: bool
    is_pointwise: bool
    is_update: bool
    is_collective: bool
    is_single: bool
    unread: tuple[int, ...]
    mutated: tuple[tuple[int, str], ...]
    arguments: tuple[str, ...]
    shortcut: Shortcut | None


# By the identity of the overload, which a row keeps alive: its own hash is ten times slower.
INFOS: dict[int, OpInfo] = {}


def op_info(func: Any) -> OpInfo:
    """Read the schema of an op overload such as `torch.ops.aten.div.Tensor`, once."""
    if id(func) not in INFOS:
        INFOS[id(func)] = _read_info(func)
    return INFOS[id(func)]


def _read_info(func: Any) -> OpInfo:
    schema = func._schema  # noqa: SLF001 - the public name of a schema is this one
    base = schema.name.split("::")[-1]
    alias = schema.returns[0].alias_info if schema.returns else None
    mutated = tuple(
        (position, argument.name)
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    mutated += _WRITES_UNSAID.get(base, ())
    is_screened = base not in _CANNOT_MAKE and base not in _UNINITIALISED
    is_pointwise = torch.Tag.pointwise in func.tags
    is_view = alias is not None and not alias.is_write and not mutated
    return OpInfo(
        func=func,
        call=func._op if type(func) is OpOverload else func,  # noqa: SLF001 - it only passes on
        name=schema.name,
        is_view=is_view,
        is_fresh=alias is None,
        is_screened=not is_view and is_screened,
        is_pointwise=is_pointwise,
        is_update=is_pointwise and is_screened and mutated == _SELF and base not in _OVERWRITES,
        is_collective=schema.name.startswith("c10d::"),
        is_single=not mutated or (mutated == _SELF and len(schema.returns) == 1),
        unread=(0,) if base in _OVERWRITES and mutated == _SELF else _out_positions(schema),
        mutated=mutated,
        arguments=tuple(argument.name for argument in schema.arguments),
        shortcut=shortcut_of(base),
    )


def _out_positions(schema: Any) -> tuple[int, ...]:
    """Where the `out=` tensors stand, counted from the last."""
    return tuple(range(-sum(argument.is_out for argument in schema.arguments), 0))


class Call(NamedTuple):
    """One call of an op: what its schema says, and its arguments."""

    info: OpInfo
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def inputs(self) -> list[Tensor]:
        """Every tensor among the arguments, those inside lists too."""
        return inputs_of(self.args, self.kwargs)

    @property
    def named(self) -> Iterable[tuple[str, Any]]:
        """Every argument with its name."""
        return (*zip(self.info.arguments, self.args, strict=False), *self.kwargs.items())

    @property
    def numbers(self) -> tuple[tuple[str, float], ...]:
        """The plain numbers among the arguments, by name."""
        return tuple(
            (name, float(value))
            for name, value in self.named
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        )

    def outputs(self, returned: Any) -> list[Tensor]:
        """Returned tensors, then the mutated arguments that were not returned."""
        outputs = tensors_in(returned if isinstance(returned, (list, tuple)) else (returned,))
        for position, name in self.info.mutated:
            in_place = position < len(self.args)
            value = self.args[position] if in_place else self.kwargs.get(name)
            known = {id(tensor) for tensor in outputs}
            outputs.extend(t for t in tensors_in((value,)) if id(t) not in known)
        return outputs


def inputs_of(args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> list[Tensor]:
    """Every tensor among the arguments of a call."""
    found = tensors_in(args)
    return found + tensors_in(tuple(kwargs.values())) if kwargs else found


def tensors_in(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among some values and inside the lists among them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(v for v in value if isinstance(v, Tensor))
    return found
