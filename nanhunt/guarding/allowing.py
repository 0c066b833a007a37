"""What the user lets pass: modules, ops and call sites whose births do not count."""

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any, TypeAlias

import torch
from torch import nn

from nanhunt.causes import base_name
from nanhunt.errors import UsageError

Allowable: TypeAlias = str | nn.Module

_SITE = re.compile(r"(.+):(\d+)")


class Allowed:
    """Modules (or their paths), ops (`"log"`, `"aten::log"`) and call sites (`"train.py:31"`)."""

    def __init__(self, given: Allowable | Iterable[Allowable]) -> None:
        # What is no list and nothing to allow either is refused with the other entries below.
        entries: Any = given
        if isinstance(given, str | nn.Module) or not isinstance(given, Iterable):
            entries = (given,)
        self._words: list[str] = []
        self._sites: list[tuple[tuple[str, ...], int]] = []
        self._modules: set[int] = set()
        self._held: list[nn.Module] = []  # while they live no other object has their `id`
        for entry in entries:
            if isinstance(entry, nn.Module):
                self._held.append(entry)
                self._modules.update(id(module) for module in entry.modules())
            elif not isinstance(entry, str):
                raise UsageError(
                    f"allow takes modules, names of ops or modules, and call sites as "
                    f"'file.py:31'; got {type(entry).__name__}"
                )
            elif site := _SITE.fullmatch(entry):
                self._sites.append((PurePath(site[1]).parts, int(site[2])))
            else:
                self._words.append(entry)

    def check(self, model: nn.Module) -> None:
        """Refuse a name that is no op and, now that the model is known, none of its modules.

        Raises:
            UsageError: such a name.
        """
        own = type(model).__name__
        paths = [name for name, _ in model.named_modules() if name]
        known = {own, *paths, *(f"{own}.{path}" for path in paths)}
        for word in self._words:
            if word not in known and not word.startswith("custom:") and not _is_known_op(word):
                tops = ", ".join(name for name, _ in model.named_children())
                raise UsageError(
                    f"allow names {word!r}, which is no op of torch and no module of {own}; "
                    f"{f'its modules begin with {tops}' if tops else 'it has no modules inside'}"
                )

    def permits(
        self, op: str, module: str, place: tuple[str, int] | None, names: Mapping[int, str]
    ) -> bool:
        """Whether a birth in this op, module or line is let pass; `names` are paths by `id`."""
        if any(_is_op(word, op) or _is_within(module, word) for word in self._words):
            return True
        if module and any(names.get(known) == module for known in self._modules):
            return True
        return place is not None and any(
            line == place[1] and PurePath(place[0]).parts[-len(parts) :] == parts
            for parts, line in self._sites
        )


@functools.cache
def _ops_of_torch() -> frozenset[str]:
    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}  # noqa: SLF001
    return frozenset({*names, *map(base_name, names)})


def _is_known_op(word: str) -> bool:
    """Whether an op of torch, or a custom Function that is defined by now, has this name."""
    functions = [torch.autograd.Function]
    for function in functions:
        functions.extend(function.__subclasses__())
    return word in _ops_of_torch() or word in {function.__name__ for function in functions}


def _is_op(word: str, op: str) -> bool:
    if "::" in word:
        return word == op
    return word in (base_name(op), op.removeprefix("custom:"))


def _is_within(module: str, path: str) -> bool:
    """Whether a module is another one or inside of it.

    A path that the recorder found begins with the class of the outermost module; it may be left
    out.
    """
    inside = module.partition(".")[2]
    return any(m == path or m.startswith(f"{path}.") for m in (module, inside) if m)
