"""What the optimizers hold: the parameters in the model's order, their groups and gradients."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from nanhunt.measurement import is_distributed, local
from nanhunt.subject import Subject

_ALONE = "optimizer"  # the group of what no module holds


class Held:
    """Every tensor that some optimizer steps, once; learnt anew when one is given more of them.

    The order is that of the model, then of the optimizers: that of
    `clip_grad_norm_(model.parameters(), ...)`, whose sum depends on it in the last bit.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        groups: Mapping[str, Iterable[str | nn.Parameter]],
    ) -> None:
        self._model, self._optimizers, self._groups = model, optimizers, groups
        self._count = -1
        self.is_spread = False  # over processes
        self.parameters: list[Tensor] = []
        self.names: list[str] = []
        self.group_names: list[str] = []
        self._group_of: list[int] = []
        self.refresh()

    def refresh(self) -> None:
        """Look again, if the optimizers hold more or fewer than before."""
        count = sum(len(g["params"]) for o in self._optimizers for g in o.param_groups)
        if count != self._count:
            self._learn()
            self._count = count

    def _learn(self) -> None:
        held = {id(p): p for o in self._optimizers for g in o.param_groups for p in g["params"]}
        named = {id(p): name for name, p in self._model.named_parameters()}
        order = [*(i for i in named if i in held), *(i for i in held if i not in named)]
        self.parameters = [held[i] for i in order]
        self.names = [named.get(i, f"a tensor {list(held[i].shape)}") for i in order]
        groups = self._groups_by_name()
        of = [groups.get(named[i], _top(named[i])) if i in named else _ALONE for i in order]
        self.group_names = list(dict.fromkeys([*filter(of.__contains__, groups.values()), *of]))
        self._group_of = [self.group_names.index(name) for name in of]
        self.is_spread = any(map(is_distributed, self.parameters))

    def _groups_by_name(self) -> dict[str, str]:
        subject = Subject(self._model, (), len, groups=self._groups)
        found = subject.parameter_groups()
        return {name: group for group, names in found.items() for name in names}

    def gradients(self) -> tuple[list[Tensor], Sequence[int]]:
        """The gradients that exist, and the positions of their parameters.

        Of those that are spread over processes, the parts that this one holds.
        """
        found = [p.grad for p in self.parameters]
        if self.is_spread:
            found = [None if gradient is None else local(gradient) for gradient in found]
        there = [gradient for gradient in found if gradient is not None]
        if len(there) == len(found):
            return there, range(len(found))
        return there, [i for i, gradient in enumerate(found) if gradient is not None]

    def by_group(self, norms: Sequence[float], positions: Sequence[int]) -> dict[str, float]:
        """The norms of the groups from those of single gradients."""
        squares = [0.0] * len(self.group_names)
        group_of = self._group_of
        for norm, position in zip(norms, positions, strict=True):
            squares[group_of[position]] += norm * norm
        return {name: x**0.5 for name, x in zip(self.group_names, squares, strict=True)}

    def group_at(self, position: int) -> int:
        """The number of the group of a parameter."""
        return self._group_of[position]


def _top(name: str) -> str:
    return name.split(".", maxsplit=1)[0] if "." in name else "model"
