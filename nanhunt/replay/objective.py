"""The loss of a step: what `loss_fn` returned, its named terms, and the ops that belong to each."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanhunt.errors import SubjectError, UsageError
from nanhunt.records import OpEvent, Term
from nanhunt.variants import Variant


@dataclass(slots=True)
class Objective:
    """The loss that is differentiated, and all terms that the subject returned."""

    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


def read_objective(value: Any, variant: Variant, weights: Mapping[str, float]) -> Objective:
    """Read what `loss_fn` returned, and take out what the variant takes out."""
    chosen = [name for name in variant.without if name not in weights]
    if not isinstance(value, Mapping):
        if chosen or variant.alone:
            names = ", ".join((*chosen, *variant.alone))
            raise UsageError(
                f"cannot ablate {names}: the loss is one scalar without named terms and the "
                f"subject's weights are {', '.join(weights) or 'none'}"
            )
        return Objective(value)
    terms = {str(name): _as_tensor(name, term) for name, term in value.items() if name != "loss"}
    kept = {
        name: term
        for name, term in terms.items()
        if name not in chosen and (not variant.alone or name in variant.alone)
    }
    if "loss" in value and len(kept) == len(terms):
        return Objective(_as_tensor("loss", value["loss"]), terms)
    if "loss" in value and not _sums_to(terms, value["loss"]):
        raise UsageError("cannot ablate a term: the loss is not the sum of the named terms")
    if not kept:
        raise UsageError(f"nothing is left of the loss; its terms: {', '.join(terms) or 'none'}")
    return Objective(torch.stack([t.reshape(()) for t in kept.values()]).sum(), terms)


def _as_tensor(name: object, term: Any) -> Tensor:
    if isinstance(term, Tensor):
        if term.numel() != 1:
            raise SubjectError(
                f"the loss term {name!r} is to be a scalar; got shape {list(term.shape)}"
            )
        return term
    if isinstance(term, (int, float)):
        return torch.tensor(float(term))
    raise SubjectError(f"the loss term {name!r} is to be a tensor; got {type(term).__name__}")


def _sums_to(terms: Mapping[str, Tensor], loss: Tensor) -> bool:
    total = sum(float(term.detach()) for term in terms.values())
    value = float(loss.detach())
    return math.isclose(total, value, rel_tol=1e-3) or (total - total != 0 != value - value)


def check_loss(loss: Any, *, is_backward_done: bool = False) -> None:
    """Refuse what is not a scalar tensor with a graph, with a `SubjectError`.

    A loss that is shown after its backward needs no graph any more.
    """
    if not isinstance(loss, Tensor):
        raise SubjectError(
            f"loss_fn is to return a scalar tensor or a mapping of terms; got {type(loss).__name__}"
        )
    if loss.numel() != 1:
        raise SubjectError(
            f"the loss is to be a scalar; got shape {list(loss.shape)}: reduce it, as by .mean()"
        )
    if not loss.requires_grad and not is_backward_done:
        raise SubjectError(
            "the loss has no graph: nothing in it depends on a parameter that requires a gradient "
            "(a detach, a no_grad block, or a value taken with .item()?)"
        )


def term_owners(terms: Mapping[str, Tensor]) -> dict[int, tuple[str, ...]]:
    """For every node number, the terms from whose value the node can be reached."""
    owners: dict[int, tuple[str, ...]] = {}
    for name, term in terms.items():
        for number in _reachable_numbers(term):
            owners[number] = (*owners.get(number, ()), name)
    return owners


def _reachable_numbers(value: Tensor) -> Iterator[int]:
    return (node._sequence_nr() for node in reachable_nodes([value.grad_fn]))  # noqa: SLF001 - not public


@contextlib.contextmanager
def strangers_kept(loss: Tensor, known: Iterable[Tensor]) -> Iterator[None]:
    """Put the gradients back of leaves that the loss holds but nobody knows of."""
    ours = {id(tensor) for tensor in known}
    leaves = [getattr(node, "variable", None) for node in reachable_nodes([loss.grad_fn])]
    found = [(leaf, leaf.grad) for leaf in leaves if leaf is not None and id(leaf) not in ours]
    for leaf, _ in found:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, gradient in found:
            leaf.grad = gradient


def reachable_nodes(starts: Iterable[Any]) -> Iterator[Any]:
    """Every autograd node that a backward from some nodes may run, once each."""
    stack, seen = list(starts), set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(following for following, _ in node.next_functions)


def count_ops(
    terms: Mapping[str, Tensor],
    owners: Mapping[int, tuple[str, ...]],
    events: Sequence[OpEvent],
    *,
    loss_at: int = 0,
) -> tuple[Term, ...]:
    """Each term with the number of ops that belong to it alone.

    A gradient that is taken before the loss is there, at event `loss_at`, is part of the forward: a
    penalty on gradients differentiates it.
    """
    forward = dict.fromkeys(terms, 0)
    backward = dict.fromkeys(terms, 0)
    for event in events:
        number = event.made if event.number is None else event.number
        owner = owners.get(number, ()) if number is not None else ()
        if len(owner) == 1:
            is_forward = event.phase == "forward" or event.index < loss_at
            (forward if is_forward else backward)[owner[0]] += 1
    return tuple(
        Term(name, float(term.detach()), term.requires_grad, forward[name], backward[name])
        for name, term in terms.items()
    )
