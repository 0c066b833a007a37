"""The state before the optimizer step that was taken last, for asking it what it did."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nanhunt.watching.held import Held


class Previous:
    """Parameters, gradients and optimizer state from before a step, in memory that it keeps.

    Costs as much memory as they do and one fused copy per step; kept on request only.
    """

    def __init__(self, held: Held, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._held, self._optimizers = held, optimizers
        self._homes: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._states: list[dict[Any, dict[str, Any]]] = []
        self._tables: list[list[dict[str, Any]]] = []
        self._gradients: list[tuple[Tensor, Tensor]] = []
        self.step: int | None = None

    @torch.no_grad()
    def take(self, step: int) -> None:
        """Note everything right before the optimizers step; gradients are clipped by then."""
        gradients, positions = self._held.gradients()
        parameters = self._held.parameters
        states = [dict(_tensors_of(optimizer.state)) for optimizer in self._optimizers]
        homes = [*parameters, *gradients, *(t for found in states for t in found.values())]
        if [(t.shape, t.dtype) for t in homes] != [(c.shape, c.dtype) for c in self._copies]:
            self._copies = [torch.empty_like(t, requires_grad=False) for t in homes]
        _copy(self._copies, homes)
        copies = {id(home): copy for home, copy in zip(homes, self._copies, strict=True)}
        self._homes = homes[: len(parameters)]
        pairs = zip(positions, gradients, strict=True)
        self._gradients = [(parameters[i], copies[id(g)]) for i, g in pairs]
        self._states = [_described(o.state, copies) for o in self._optimizers]
        self._tables = [[_shallow(g) for g in o.param_groups] for o in self._optimizers]
        self.step = step

    def forget(self) -> None:
        """Let go of it: it is not what led to the parameters as they are."""
        self.step = None

    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        """The parameters that had a gradient, and it."""
        return self._gradients

    @torch.no_grad()
    def restore(self) -> None:
        """Give parameters and optimizers that state back."""
        for home, copy in zip(self._homes, self._copies, strict=False):
            home.copy_(copy)
        for optimizer, state, tables in zip(
            self._optimizers, self._states, self._tables, strict=True
        ):
            optimizer.state.clear()
            optimizer.state.update({p: _own(values) for p, values in state.items()})
            for group, table in zip(optimizer.param_groups, tables, strict=False):
                group.update(_own(table))


def _copy(copies: list[Tensor], homes: list[Tensor]) -> None:
    strided = [i for i, t in enumerate(homes) if t.layout is torch.strided]
    torch._foreach_copy_([copies[i] for i in strided], [homes[i] for i in strided])
    for i in set(range(len(homes))).difference(strided):
        copies[i] = homes[i].clone()


def _tensors_of(state: Any) -> Iterator[tuple[int, Tensor]]:
    yield from (
        (id(value), value)
        for values in state.values()
        for value in values.values()
        if isinstance(value, Tensor)
    )


def _described(state: Any, copies: dict[int, Tensor]) -> dict[Any, dict[str, Any]]:
    """The state of an optimizer with its tensors replaced by their copies."""
    return {
        p: {key: copies.get(id(value), value) for key, value in values.items()}
        for p, values in state.items()
    }


def _shallow(group: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in group.items()
        if key != "params"
    }


def _own(values: dict[str, Any]) -> dict[str, Any]:
    """Copies of the copies: what steps on must not write into them."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in values.items()}


class Kept:
    """Parameters and optimizer state as they are, to be put back as the same tensors."""

    def __init__(self, held: Held, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self._parameters = [(p, p.detach().clone()) for p in held.parameters]
        self._optimizers = [
            (
                o,
                {p: dict(values) for p, values in o.state.items()},
                [dict(g) for g in o.param_groups],
            )
            for o in optimizers
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back; the optimizer's tensors were not written to meanwhile."""
        for parameter, value in self._parameters:
            parameter.copy_(value)
        for optimizer, state, groups in self._optimizers:
            optimizer.state.clear()
            optimizer.state.update(state)
            for group, known in zip(optimizer.param_groups, groups, strict=True):
                group.clear()
                group.update(known)
