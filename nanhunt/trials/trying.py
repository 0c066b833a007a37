"""A step with some of its calls changed: the mode that a trial runs under."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nanhunt.trials.calls import Call, CallMode, Site
from nanhunt.trials.edits import DoesNotApplyError, Edit
from nanhunt.trials.formulas import Formula, Formulas, stable_form


@dataclass(frozen=True, slots=True)
class Patch:
    """What is changed: edits by call site, and the call whose part in a formula is avoided."""

    edits: Mapping[Site, Edit] = field(default_factory=dict)
    avoided: Site | None = None

    def also(self, other: "Patch") -> "Patch":
        """Both changes at once."""
        return Patch({**self.edits, **other.edits}, self.avoided or other.avoided)


NO_PATCH = Patch()

_CHANGING = frozenset(["batch_norm", "instance_norm"])  # they write to running statistics


class Trying(CallMode):
    """Runs a step with a patch, and notes where it took hold."""

    def __init__(self, patch: Patch) -> None:
        super().__init__()
        self._patch = patch
        self._formulas = Formulas() if patch.avoided is not None else None
        self._is_wide = False
        self._descended: dict[int, Any] = {}  # tensors that the avoided call took part in
        self.times = 0
        self.forms: dict[Site, str] = {}  # where a stable form stood in, and which
        self._apart = self._size = 0.0  # squares, over results that were finite

    @property
    def result_change(self) -> float | None:
        """How far the results of edited calls are from what they were, where that was finite."""
        return math.sqrt(self._apart / self._size) if self._size else None

    def meet(self, call: Call) -> Any:
        """What a call returns, changed where the patch says so."""
        edit = self._patch.edits.get(call.site)
        if edit is not None:
            return self._edited(edit, call)
        if self._formulas is not None:
            return self._followed(self._formulas, call)
        if self._is_wide:
            return self._widened(call)
        return self.proceed(call)

    def _edited(self, edit: Edit, call: Call) -> Any:
        try:
            if edit.follows:
                self._is_wide = True
                with _no_autocast(call):
                    value = edit.apply(call, self._widened)
            else:
                before = _as_it_was(call)
                value = edit.apply(call, self.proceed)
                self._measure(before, value)
        except DoesNotApplyError:
            return self.proceed(call)
        self.times += 1
        return value

    def _measure(self, before: Tensor | None, value: Any) -> None:
        if before is None or not isinstance(value, Tensor) or value.shape != before.shape:
            return
        with torch.no_grad(), contextlib.suppress(RuntimeError):  # vmap lets no number out
            wide = torch.complex128 if before.is_complex() else torch.float64
            kept = before.isfinite()
            was, now = (torch.where(kept, t, 0).to(wide) for t in (before, value))
            self._apart += float((now - was).abs().square().sum())
            self._size += float(was.abs().square().sum())

    def _widened(self, call: Call) -> Any:
        """A call whose operands may have come to differ in their dtype."""
        try:
            return self.proceed(call)
        except RuntimeError:
            found = [t for t in pytree.tree_leaves((call.args, call.kwargs)) if _is_floating(t)]
            widest = max((t.dtype for t in found), key=_width, default=None)
            if widest is None or all(t.dtype == widest for t in found):
                raise
            args, kwargs = pytree.tree_map_only(
                Tensor, lambda t: t.to(widest) if _is_floating(t) else t, (call.args, call.kwargs)
            )
            return self.proceed(call._replace(args=args, kwargs=kwargs))

    def _followed(self, formulas: Formulas, call: Call) -> Any:
        formula = Formula(call.site.name, call.func, call.args, call.kwargs)
        is_avoided = call.site == self._patch.avoided
        if is_avoided or any(id(a) in self._descended for a in call.args):
            form = _form(formulas, formula)
            if form is not None:
                self.times += 1
                self.forms.setdefault(call.site, form[1])
                return form[0]
        value = self.proceed(call)
        formulas.note(formula, value)
        parts = [a for a in pytree.tree_leaves(call.args) if isinstance(a, Tensor)]
        if is_avoided or any(id(a) in self._descended for a in parts):
            self._descended[id(value)] = value
        return value


def _as_it_was(call: Call) -> Tensor | None:
    """What a call would have returned; None where to ask twice would change something."""
    name = getattr(call.func, "__name__", "")
    writes = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
    if writes or "out" in call.kwargs or name in _CHANGING:
        return None
    generator = torch.get_rng_state()
    try:
        with torch.no_grad():
            value = call.func(*call.args, **call.kwargs)
    except RuntimeError:
        return None
    finally:
        torch.set_rng_state(generator)
    return value.detach().clone() if _is_inexact(value) else None


def _form(formulas: Formulas, formula: Formula) -> tuple[Tensor, str] | None:
    try:
        return stable_form(formulas, formula)
    except (RuntimeError, TypeError, IndexError):
        return None  # its operands are not what the rule is about


def _is_inexact(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _width(dtype: torch.dtype) -> int:
    return dtype.itemsize


@contextlib.contextmanager
def _no_autocast(call: Call) -> Iterator[None]:
    tensors = [a for a in call.args if isinstance(a, Tensor)]
    device = tensors[0].device.type if tensors else "cpu"
    with torch.autocast(device, enabled=False):
        yield
