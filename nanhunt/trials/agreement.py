"""How far a step with a change is from what it should have stayed: its loss, terms and gradients.

All distances are relative, and each is the largest of the whole and of its parts: a term that is a
thousandth of the loss, or a parameter that is a thousandth of the gradient, is not to vanish behind
the others.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nanhunt.records import Run, Term

_SMALLEST = 1e-6  # a loss below this is compared as if it were as large
# A part below this share of the whole is compared as if it had this share; half types round more.
_TERM_SHARE = 0.1
_SHARE = {True: 0.1, False: 1e-3}

Gradients = Mapping[str, Tensor]


def relative(loss: float, before: float, least: float = 0.0) -> float | None:
    """By how much a number changed; None where one of the two is not finite."""
    if not math.isfinite(before) or not math.isfinite(loss):
        return None
    return abs(loss - before) / max(abs(before), least, _SMALLEST)


def loss_change(run: Run, before: Run) -> float | None:
    """By how much the loss changed, or that of its terms which changed most."""
    whole = relative(run.loss, before.loss)
    least = _TERM_SHARE * max(
        (abs(v) for v in (before.loss, *_values(before.terms)) if math.isfinite(v)), default=0.0
    )
    given = {term.name: term.value for term in run.terms}
    parts = (relative(given.get(term.name, math.nan), term.value, least) for term in before.terms)
    return max((change for change in (whole, *parts) if change is not None), default=None)


def _values(terms: Sequence[Term]) -> tuple[float, ...]:
    return tuple(term.value for term in terms)


def distance(gradients: Gradients, reference: Gradients, *, is_half: bool) -> float:
    """How far gradients are from those of a reference, all together and each by itself."""
    apart = {name: _apart(gradients.get(name), g) for name, g in reference.items()}
    apart |= {name: _norm(g) for name, g in gradients.items() if name not in reference}
    norms = {name: _norm(g) for name, g in reference.items()}
    whole = math.hypot(*norms.values())
    if not whole:
        return math.hypot(*apart.values())
    least = _SHARE[is_half] * whole
    parts = (apart[name] / max(norm, least) for name, norm in norms.items())
    return max(math.hypot(*apart.values()) / whole, *parts)


def survivors(native: Gradients) -> dict[str, Tensor]:
    """Which elements of a failing step's gradients are finite.

    A 0 is not among them: it may be what a guard has made of one that was not.
    """
    kept = {name: torch.isfinite(g) & (g != 0) for name, g in native.items()}
    return {name: mask for name, mask in kept.items() if bool(mask.any())}


def of_survivors(gradients: Gradients, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients at those elements alone."""
    return {n: torch.where(kept[n], g, 0) for n, g in gradients.items() if n in kept}


def fates(gradients: Gradients, native: Gradients) -> tuple[int, int]:
    """How many parameters lost their gradient, and how many non-finite ones became a number."""
    live = {name for name, g in gradients.items() if bool(g.any())}
    vanished = sum(bool(g.any()) and name not in live for name, g in native.items())
    revived = sum(name in live and not bool(torch.isfinite(g).all()) for name, g in native.items())
    return vanished, revived


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach().to(_double(tensor))))


def _apart(given: Tensor | None, expected: Tensor) -> float:
    wide = expected.to(_double(expected))
    return _norm(wide if given is None else given.to(wide.dtype) - wide)


def _double(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64
