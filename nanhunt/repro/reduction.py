"""A smaller scene that fails in the same way: the slice of the operands that the failure needs.

Nothing is known of single ops. Every dimension that fits the offending result is narrowed to the
offending element where the call, run again, still returns there what it returned before; a smaller
slice that fails for a reason of its own (the deviation of one element, say) does not.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nanhunt import measurement
from nanhunt.recorder.captured import is_mutating
from nanhunt.repro.scene import Look, Scene

# Seconds after which what was reached so far is good enough.
_PATIENCE = 20.0
# By how much finite elements beside the offending ones may differ: a narrower sum rounds otherwise.
_TOLERANCE = 1e-2


@dataclass(frozen=True, slots=True)
class _Trial:
    """A scene with what its offending result is to be."""

    scene: Scene
    look: Look
    expected: Tensor
    index: tuple[int, ...]

    def holds(self) -> bool:
        """Whether the scene, run, gives what is expected."""
        try:
            results = self.scene.results()
        except (RuntimeError, IndexError, ValueError, TypeError):
            return False
        if self.look.position >= len(results):
            return False
        result = results[self.look.position].tensor.detach()
        is_there = bool(self.look.mask(result).any())
        return is_there and _agree(result, self.expected)


@dataclass(frozen=True, slots=True)
class Reduced:
    """The smallest scene that was found, where the failure shows in it, and the shapes before."""

    scene: Scene
    look: Look
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    note: str = ""


def reduced(scene: Scene, look: Look) -> Reduced:
    """Cut lists to one entry and dimensions to one slice, as long as the failure stays."""
    if not scene.is_dense or _is_entangled(scene):
        return Reduced(scene, look)
    start = time.monotonic()
    reference = scene.results()[look.position].tensor.detach()
    mask = replace(look, at=None).mask(reference)
    index = look.at or next(iter(measurement.first_indices(mask)), ())
    best = _Trial(scene, look, reference, index)
    note = ""
    for trial, size in _one_of_each(best):
        if trial.holds():
            best, note = trial, f"the lists are cut to one of their {size} entries"
    shapes = {name: tuple(tensor.shape) for name, tensor in best.scene.named.items()}
    for dim in range(best.expected.dim()):
        for trial in _narrowed(best, dim):
            if time.monotonic() - start > _PATIENCE:
                break
            if trial.holds():
                best = trial
                break
    return Reduced(best.scene, best.look, shapes, note)


def _is_entangled(scene: Scene) -> bool:
    """Whether the op writes to memory at which several operands look: copies would part them."""
    if not is_mutating(scene.func):
        return False
    memories = [tensor.untyped_storage()._cdata for tensor in scene.named.values()]  # noqa: SLF001
    return len(set(memories)) < len(memories)


def _one_of_each(best: _Trial) -> Iterator[tuple[_Trial, int]]:
    """Lists of equal length, as fused optimizers take them, cut to the offending entry."""
    values = (*best.scene.args, *best.scene.kwargs.values())
    lists = [v for v in values if isinstance(v, (list, tuple)) and v and isinstance(v[0], Tensor)]
    size = len(lists[0]) if lists else 0
    count = len(best.scene.results()) if size > 1 else 0
    if not count or count % size:
        return
    place = best.look.position % size

    def cut(value: Any) -> Any:
        is_list = isinstance(value, (list, tuple)) and len(value) == size
        return [value[place]] if is_list else value

    scene = replace(
        best.scene,
        args=tuple(map(cut, best.scene.args)),
        kwargs={name: cut(value) for name, value in best.scene.kwargs.items()},
    )
    look = replace(best.look, position=best.look.position // size)
    yield replace(best, scene=scene, look=look), size


def _narrowed(best: _Trial, dim: int) -> Iterator[_Trial]:
    """The scene narrowed along one dimension of the offending result.

    Operands are laid over the result from the right, as in broadcasting, and from the left, as
    batches are; all that fit are narrowed, and where that fails each alone.
    """
    size = best.expected.shape[dim]
    if size < 2:
        return
    for from_right in (True, False):
        fitting: dict[int, int] = {}
        for tensor in best.scene.named.values():
            axis = dim - (best.expected.dim() - tensor.dim()) if from_right else dim
            if 0 <= axis < tensor.dim() and tensor.shape[axis] == size:
                fitting[id(tensor)] = axis
        groups = [fitting]
        if len(fitting) > 1:
            groups += [{one: axis} for one, axis in fitting.items()]
        yield from (_cut(best, dim, group) for group in groups if group)


def _cut(best: _Trial, dim: int, axes: dict[int, int]) -> _Trial:
    """The trial with some tensors cut to one slice along the axis named for each."""
    place = best.index[dim]

    def cut(tensor: Tensor) -> Tensor:
        if id(tensor) not in axes:
            return tensor
        part = tensor.detach().narrow(axes[id(tensor)], place, 1).clone()
        return part.requires_grad_(tensor.requires_grad)

    owner = list(best.scene.trained.values())[best.look.position : best.look.position + 1]
    # The gradient of an operand has its shape; any other result is cut with the dimension.
    is_cut = id(owner[0]) in axes if owner else True
    expected = best.expected.narrow(dim, place, 1) if is_cut else best.expected
    index = _at_zero(best.index, dim) if is_cut else best.index
    look = best.look
    if look.at is not None:
        look = replace(look, at=index)
    return _Trial(best.scene.mapped(cut), look, expected, index)


def _at_zero(index: Sequence[int], dim: int) -> tuple[int, ...]:
    return (*index[:dim], 0, *index[dim + 1 :])


def _agree(result: Tensor, expected: Tensor) -> bool:
    """Whether two results are non-finite at the same elements in the same way, and alike beside."""
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return False
    one, other = (_parts(tensor) for tensor in (result, expected))
    finite = torch.isfinite(one)
    if not torch.equal(finite, torch.isfinite(other)):
        return False
    if not torch.equal(one[~finite].nan_to_num(2.0), other[~finite].nan_to_num(2.0)):
        return False
    near, exact = one[finite], other[finite]
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    return torch.allclose(near, exact, rtol=_TOLERANCE, atol=_TOLERANCE * largest)


def _parts(tensor: Tensor) -> Tensor:
    """The numbers of a tensor as doubles, a complex one's two parts side by side."""
    plain = tensor.resolve_conj().resolve_neg()
    return (torch.view_as_real(plain) if plain.is_complex() else plain).double()
