"""Small changes of one call, as text: what is tried is what the report shows.

An edit replaces an operand of a call, a keyword of it, or what it returns. In its text `{x}` and
`{y}` stand for the first and the second operand in the order of the formula (in `a / b` the divisor
is `{y}`) and `{call}` for the call as it was.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from nanhunt.trials.calls import Call
from nanhunt.trials.decompositions import detached, eigh_by_svd, gap_only, loaded, split

Target: TypeAlias = Literal["x", "y", "call", "keyword"]
Proceed: TypeAlias = Callable[[Call], Any]


class DoesNotApplyError(Exception):
    """An edit meets a call that it was not made for."""


@dataclass(frozen=True, slots=True)
class Edit:
    """One change of a call: `text` stands where `target` stood."""

    recipe: str
    target: Target
    text: str
    follows: bool = False  # what is computed from the result is widened along with it

    def apply(self, call: Call, proceed: Proceed) -> Any:
        """What the changed call returns.

        Raises:
            DoesNotApplyError: the call has no such operand.
        """
        if self.target == "call":
            return self._value(call=proceed(call), x=_operand(call, "x"))
        if self.target == "keyword":
            return proceed(_with_keyword(call, self.text))
        operand, place = _operand(call, self.target), _place(call)
        changed = self._value(**{self.target: operand, "f": _of_operand(call, place[self.target])})
        position = place[self.target]
        args = tuple(changed if i == position else a for i, a in enumerate(call.args))
        returned = proceed(call._replace(args=args))
        if _is_in_place(call.func) and position == 0:  # what it wrote to was the changed copy
            return call.args[0].copy_(returned)
        return returned

    def _value(self, **names: Any) -> Any:
        return _compiled(self.text)(**{"x": None, "y": None, "call": None, "f": None, **names})


@functools.cache
def _compiled(text: str) -> Callable[..., Any]:
    own = (gap_only, detached, loaded, eigh_by_svd, split, nudged, bounded)
    ours = {function.__name__: function for function in own}
    names = {"torch": torch, "F": functional, **ours}
    code = text.format(x="x", y="y", call="call", f="f")
    made: Callable[..., Any] = eval(f"lambda x, y, call, f: {code}", names)  # noqa: S307 - our own text
    return made


def _is_in_place(func: Callable[..., Any]) -> bool:
    name = func.__name__
    return name.endswith("_") and not name.endswith("__")


_REVERSED = frozenset(["rdiv", "rtruediv", "rpow", "rsub", "rmatmul"])


def _place(call: Call) -> dict[str, int]:
    first = int(bool(call.args) and isinstance(call.args[0], str))  # the equation of an einsum
    x, y = (1, 0) if call.site.name in _REVERSED else (0, 1)
    return {"x": first + x, "y": first + y}


def _of_operand(call: Call, position: int) -> Callable[[Any], Any]:
    """The call as a function of one of its operands."""

    def called(value: Any) -> Any:
        args = (value if i == position else a for i, a in enumerate(call.args))
        return call.func(*args, **call.kwargs)

    return called


def nudged(x: Any, f: Callable[[Any], Any], step: float) -> Tensor:
    """An argument moved a little wherever the function or its derivative is not finite there."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise DoesNotApplyError
    is_bad = ~_is_regular(x, f)
    moved = x.detach() + step
    back = x.detach() - step
    moved = torch.where(_is_regular(moved, f), moved, back)
    return torch.where(is_bad, moved, x)


def bounded(number: Any, largest: float) -> float:
    """A plain number that is infinite, as the largest finite one."""
    if isinstance(number, Tensor) or not math.isinf(number):
        raise DoesNotApplyError
    return math.copysign(largest, number)


def _is_regular(x: Tensor, f: Callable[[Any], Any]) -> Tensor:
    with torch.enable_grad():
        probe = x.detach().clone().requires_grad_()
        value = f(probe)
        if not isinstance(value, Tensor) or value.shape != x.shape or not value.requires_grad:
            raise DoesNotApplyError
        (slope,) = torch.autograd.grad(value.sum(), probe)
    return value.detach().isfinite() & slope.isfinite()


def _operand(call: Call, name: str) -> Any:
    position = _place(call)[name]
    if position >= len(call.args):
        raise DoesNotApplyError
    return call.args[position]


OTHER_NAMES = {"correction": "unbiased"}


def _with_keyword(call: Call, text: str) -> Call:
    """The call with a keyword set, which may have been given by position or by an older name."""
    name, _, value = text.partition("=")
    given = {name: _compiled(value)(x=None, y=None, call=None, f=None)}
    if OTHER_NAMES.get(name) in call.kwargs:
        rest = {k: v for k, v in call.kwargs.items() if k != OTHER_NAMES[name]}
        call = call._replace(kwargs=rest)
    try:
        names = list(inspect.signature(call.func).parameters)
    except ValueError:  # a builtin does not tell
        return call._replace(kwargs={**call.kwargs, **given})
    if name not in names:
        raise DoesNotApplyError
    position = names.index(name)
    if position < len(call.args):
        args = (*call.args[:position], given[name], *call.args[position + 1 :])
        return call._replace(args=args)
    return call._replace(kwargs={**call.kwargs, **given})


# -- which edits there are for a call ----------------------------------------------------------

_HALF_FREE = {"complex64": "float32", "complex128": "float64"}
# Guards and distances from 1 that the dtype can tell from 0, the usual one first.
_EPS: Mapping[str, tuple[float, ...]] = {
    "float64": (1e-12, 1e-8, 1e-300),
    "float32": (1e-8, 1e-5, 1e-36),
    "bfloat16": (1e-4, 1e-2, 1e-36),
    "float16": (1e-4, 1e-2, 1e-7),
}
_MARGIN: Mapping[str, tuple[float, ...]] = {
    "float64": (1e-12, 1e-8),
    "float32": (1e-6, 1e-4, 2e-7),
    "bfloat16": (8e-3, 3e-2),
    "float16": (1e-3, 1e-2),
}
# The largest argument of an exponential, and one that leaves room for a sum.
_TOP: Mapping[str, tuple[float, ...]] = {
    "float64": (709.0, 700.0),
    "float32": (88.0, 80.0),
    "bfloat16": (88.0, 80.0),
    "float16": (11.0, 10.0),
}

_POSITIVE = frozenset(
    [
        "sqrt",
        "rsqrt",
        "log",
        "log2",
        "log10",
        "pow",
        "float_power",
        "lgamma",
        "digamma",
        "polygamma",
    ]
)
_OPEN_UNIT = frozenset(["acos", "asin", "arccos", "arcsin", "atanh", "arctanh", "erfinv"])
_DIVISIONS = frozenset(["div", "true_divide", "divide", "truediv", "rdiv", "rtruediv", "itruediv"])
_EXPONENTIALS = frozenset(["exp", "exp2", "expm1", "sinh", "cosh"])
_OVER_ROWS = frozenset(["softmax", "log_softmax", "logsumexp", "cross_entropy", "softmin"])
_SOLVERS = frozenset(
    (
        *("linalg_solve", "linalg_inv", "inverse", "linalg_cholesky", "cholesky", "linalg_det"),
        *("det", "logdet", "slogdet", "linalg_slogdet", "linalg_solve_triangular"),
        *("linalg_inv_ex", "linalg_cholesky_ex", "linalg_solve_ex", "triangular_solve"),
        "cholesky_solve",
    )
)
_PICKING = frozenset(["nll_loss", "cross_entropy", "nll_loss_nd", "cross_entropy_loss"])
_LOSSES = frozenset(["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy"])
_CASTS = frozenset(["to", "half", "bfloat16", "type", "type_as"])
_NORMS = frozenset(["norm", "vector_norm", "linalg_vector_norm", "linalg_norm"])


def edits_of(name: str, dtype: str) -> Iterator[Edit]:
    """The edits that a call of `name` on operands of `dtype` has, the smallest of a kind first."""
    width = _HALF_FREE.get(dtype, dtype)
    eps, margin = _EPS.get(width, _EPS["float32"]), _MARGIN.get(width, _MARGIN["float32"])
    name = name.removeprefix("special_")
    yield from _of_argument(name, eps, margin, _TOP.get(width, _TOP["float32"]))
    yield from _of_reduction(name)
    yield from _of_matrices(name, eps)
    yield Edit("eps_for_dtype", "keyword", f"eps={eps[0]:g}")
    yield Edit("eps_for_dtype", "keyword", f"eps={eps[1]:g}")
    yield Edit("finite_constant", "x", "torch.where({x}.isinf(), 0.0, {x})")
    yield Edit("finite_constant", "y", "torch.where({y}.isinf(), 0.0, {y})")
    largest = torch.finfo(getattr(torch, width)).max if width in _EPS else 3.4e38
    yield Edit("finite_constant", "y", f"bounded({{y}}, {largest:.6g})")
    wider = "float" if width in ("float16", "bfloat16") else "double"
    if name in _CASTS:
        yield Edit("upcast", "call", "{x}", follows=True)
    yield Edit("upcast", "x", f"{{x}}.{wider}()", follows=True)
    for e in eps[:2]:
        yield Edit("safe_argument", "x", f"nudged({{x}}, {{f}}, {e:g})")
    yield Edit("saturate", "call", f"{{call}}.clamp(-{largest:.6g}, {largest:.6g})")


# What is called -> its edits; <e> stands for each guard, <m> for each margin, <top> for the largest
# argument of an exponential.
_ARGUMENTS: tuple[tuple[frozenset[str], tuple[tuple[str, Target, str], ...]], ...] = (
    (
        _POSITIVE,
        (
            ("double_where", "x", "torch.where({x} > 0, {x}, 1.0)"),
            ("safe_argument", "x", "{x}.clamp_min(<e>)"),
        ),
    ),
    (
        _OPEN_UNIT,
        (
            ("double_where", "x", "torch.where({x}.abs() < 1, {x}, 0.0)"),
            ("clamp", "x", "{x}.clamp(<m> - 1, 1 - <m>)"),
        ),
    ),
    (
        frozenset(["logit", "binary_cross_entropy"]),
        (("clamp", "x", "{x}.clamp(<m>, 1 - <m>)"),),
    ),
    (
        frozenset(["log1p"]),
        (
            ("double_where", "x", "torch.where({x} > -1, {x}, 0.0)"),
            ("safe_argument", "x", "{x}.clamp_min(<m> - 1)"),
        ),
    ),
    # Its first operand is a rate, unless it is told that it is the logarithm of one.
    (frozenset(["poisson_nll_loss"]), (("clamp", "x", "{x}.clamp_min(<e>)"),)),
    (frozenset(["xlogy"]), (("safe_argument", "y", "{y}.clamp_min(<e>)"),)),
    (frozenset(["acosh", "arccosh"]), (("clamp", "x", "{x}.clamp_min(1 + <m>)"),)),
    (
        _DIVISIONS | {"atan2", "hypot", "fmod", "remainder"},
        (
            ("double_where", "y", "torch.where({y} == 0, 1.0, {y})"),
            ("safe_denominator", "y", "torch.where({y}.abs() < <e>, <e>, {y})"),
        ),
    ),
    (
        frozenset(["reciprocal"]),
        (
            ("double_where", "x", "torch.where({x} == 0, 1.0, {x})"),
            ("safe_denominator", "x", "torch.where({x}.abs() < <e>, <e>, {x})"),
        ),
    ),
    (
        _EXPONENTIALS,
        (
            ("double_where", "x", "torch.where({x} > <top>, 0.0, {x})"),
            ("clamp", "x", "{x}.clamp(-<top>, <top>)"),
        ),
    ),
    (frozenset(["entr"]) | _NORMS, (("safe_argument", "x", "{x} + <e>"),)),
    (frozenset(["weight_norm"]), (("safe_argument", "x", "torch.where({x} == 0, <e>, {x})"),)),
)


def _of_argument(
    name: str, eps: tuple[float, ...], margin: tuple[float, ...], top: tuple[float, ...]
) -> Iterator[Edit]:
    """Keep the argument away from where the function, or its derivative, is not finite."""
    for names, edits in _ARGUMENTS:
        for recipe, target, text in edits if name in names else ():
            steps = eps if "<e>" in text else margin if "<m>" in text else top
            for step in steps:
                number = f"{step:g}"
                filled = text.replace("<e>", number).replace("<m>", number).replace("<top>", number)
                yield Edit(recipe, target, filled)


def _of_reduction(name: str) -> Iterator[Edit]:
    """What is reduced may be empty, or hold nothing but -inf."""
    if name in _OVER_ROWS:
        text = "{x}.clamp_min(torch.finfo({x}.dtype).min)"
        yield Edit("finfo_min_mask", "x", text)
        yield Edit("zero_empty_rows", "call", "{call}.masked_fill({x}.isneginf().all(-1, True), 0)")
    if name == "mean":
        yield Edit("skip_empty", "call", "{call} if {x}.numel() else {x}.sum()")
    if name == "segment_reduce":
        yield Edit("skip_empty", "call", "torch.where({call}.isnan(), 0.0, {call})")
    if name in _LOSSES or name in _PICKING:
        yield Edit("skip_empty", "call", "{x}.sum() * 0 if {call}.isnan() else {call}")
    if name in ("std", "var", "std_mean", "var_mean"):
        yield Edit("correction_zero", "keyword", "correction=0")
    if name == "ctc_loss":
        yield Edit("zero_infinity", "keyword", "zero_infinity=True")


def _of_matrices(name: str, eps: tuple[float, ...]) -> Iterator[Edit]:
    if name in ("linalg_qr", "qr"):
        for e in (1e-5, 1e-3):
            text = f"{{x}} + {e:g} * torch.eye(*{{x}}.shape[-2:]).to({{x}})"
            yield Edit("diagonal_loading", "x", text)
    if name in _SOLVERS:
        for e in eps:
            text = f"{{x}} + {e:g} * torch.eye({{x}}.shape[-1]).to({{x}})"
            yield Edit("diagonal_loading", "x", text)
    if name in ("linalg_eigh", "symeig", "linalg_svd", "svd", "linalg_eig"):
        if name != "linalg_eig":
            yield Edit("gap_only_projector", "call", "gap_only({x}, {call})")
        for e in (1e-2, 1.0):
            yield Edit("more_loading", "x", f"loaded({{x}}, {e:g})")
        if name == "linalg_eigh":
            yield Edit("svd_instead_of_eigh", "call", "eigh_by_svd({x})")
        yield Edit("detach_vectors", "call", "detached({call})")
