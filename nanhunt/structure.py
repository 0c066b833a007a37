"""The tensors inside a batch or an output, whatever holds them."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def is_named_tuple(value: Any) -> bool:
    """Whether a value is a tuple whose entries have names."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Rebuild a batch with every tensor in it changed; other values are kept as they are.

    Looks into tuples, named tuples, lists, mappings and data classes. A tensor that occurs twice
    is changed once, so that aliases stay aliases.
    """
    known: dict[int, Tensor] = {}

    def once(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            known[id(tensor)] = change(tensor)
        return known[id(tensor)]

    return _map(value, once)


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if is_named_tuple(value):
        return type(value)(*(_map(item, change) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_map(item, change) for item in value)
    if isinstance(value, dict):
        changed = copy.copy(value)  # keeps the class, and what else it carries
        for key, item in value.items():
            changed[key] = _map(item, change)
        return changed
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **_map(fields, change))
    return value


def named_tensors(value: Any, name: str = "batch") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a batch with the expression that reaches it: `batch[0]`, `batch.y`."""
    if isinstance(value, Tensor):
        yield name, value
    elif is_named_tuple(value):
        for key in value._fields:
            yield from named_tensors(getattr(value, key), f"{name}.{key}")
    elif isinstance(value, (tuple, list)):
        for position, item in enumerate(value):
            yield from named_tensors(item, f"{name}[{position}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from named_tensors(item, f"{name}[{key!r}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for entry in dataclasses.fields(value):
            yield from named_tensors(getattr(value, entry.name), f"{name}.{entry.name}")


def count_samples(batch: Any) -> int | None:
    """The leading size that most tensors of a batch share; None when there is none."""
    sizes = [tensor.shape[0] for _, tensor in named_tensors(batch) if tensor.dim() > 0]
    return max(set(sizes), key=sizes.count) if sizes else None


def take_samples(batch: Any, count: int, of: int) -> Any:
    """The first `count` samples of a batch: every tensor with `of` leading entries is cut."""
    return pick_samples(batch, range(count), of)


def pick_samples(batch: Any, indices: Sequence[int], of: int) -> Any:
    """Some samples of a batch of `of`, as `take_samples` cuts it."""
    return map_tensors(batch, lambda t: _picked(t, indices) if t.dim() and len(t) == of else t)


def _picked(tensor: Tensor, indices: Sequence[int]) -> Tensor:
    """Some leading entries of a tensor in the layout that it has; a range is a view if it can be.

    A compressed sparse tensor is taken apart for that and put together again.
    """
    if tensor.is_nested:
        parts = [tensor.unbind()[i] for i in indices]
        nested: Tensor = torch.nested.as_nested_tensor(parts, layout=tensor.layout)
        return nested
    if tensor.layout is torch.strided:
        if isinstance(indices, range) and indices.step == 1:
            return tensor[indices.start : indices.stop]
        return tensor[list(indices)]
    chosen = torch.tensor(list(indices), device=tensor.device)
    picked = tensor.to_sparse_coo().index_select(0, chosen)
    is_compressed = tensor.layout is not torch.sparse_coo
    cut: Tensor = picked.to_sparse(layout=tensor.layout) if is_compressed else picked
    return cut
