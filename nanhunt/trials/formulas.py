"""Stable forms: what a number is on paper, followed through the calls that made it.

The logarithm of a product of exponentials needs no exponential, and the root of a sum of squares is
a norm. While a step runs this keeps what each tensor was computed from, and answers for a tensor
what its logarithm is without computing the tensor first, or which one function has the same value.
Kahan's rule: never form the large or the small number when only its logarithm is used.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

_DEEPEST = 24  # calls that a formula is followed through

_VIEWS = frozenset(
    (
        *("getitem", "reshape", "view", "unsqueeze", "squeeze", "transpose", "permute", "t"),
        *("diagonal", "expand", "expand_as", "flatten", "gather", "index_select", "select"),
        *("narrow", "contiguous", "clone", "mT", "to", "float", "double", "half", "diag"),
        *("take_along_dim", "view_as"),
    )
)


_JOINS = ("stack", "cat", "concat", "concatenate")
_CASTS = ("half", "to", "float", "double")


@dataclass(frozen=True, slots=True)
class Formula:
    """One call as it was made: the tensor that it returned is `value`."""

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    value: Tensor | None = None
    versions: tuple[int, ...] = ()

    @property
    def is_current(self) -> bool:
        """Whether no operand was written to since."""
        return self.versions == _versions(self.args)


def _versions(args: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(a._version for a in args if isinstance(a, Tensor))  # noqa: SLF001 - only there


Log: TypeAlias = tuple[Tensor, str] | None


class Formulas:
    """What each tensor of a step was computed from, for as long as this is held."""

    def __init__(self) -> None:
        self._of: dict[int, Formula] = {}
        self._logs: dict[int, Log] = {}

    def note(self, made: Formula, value: Any) -> None:
        """Remember one call, if it made a new tensor; one that was written to is no formula."""
        if any(value is a for a in made.args):
            self._of.pop(id(value), None)
        elif type(value) is Tensor:
            versions = _versions(made.args)
            self._of.setdefault(id(value), replace(made, value=value, versions=versions))

    def of(self, value: Any) -> Formula | None:
        """The call that made a tensor."""
        made = self._of.get(id(value))
        return made if made is not None and made.is_current else None

    # -- logarithms --------------------------------------------------------------------------

    def log(self, value: Any, depth: int = _DEEPEST) -> Log:
        """The logarithm of a tensor that exponentials were combined to, without forming it."""
        made = self.of(value)
        if made is None or depth == 0:
            return None
        if id(value) not in self._logs:
            self._logs[id(value)] = self._log(made, depth)
        return self._logs[id(value)]

    def _log(self, made: Formula, depth: int) -> Log:
        found = self._seen_through(made, lambda part: self.log(part, depth - 1))
        if found is not None:
            return found
        rule = _RULES.get(made.name)
        return rule(self, made, depth - 1) if rule else None

    def _seen_through(self, made: Formula, rule: Callable[[Any], Log]) -> Log:
        """What a rule says of the tensors that another one only shows or puts together."""
        if made.name in _JOINS:
            logs = [log for log in map(rule, made.args[0]) if log is not None]
            if not logs or len(logs) < len(made.args[0]):
                return None
            joined = made.func([log[0] for log in logs], *made.args[1:], **made.kwargs)
            return joined, logs[0][1]
        if made.name not in _VIEWS:
            return None
        inner = rule(made.args[0])
        if inner is None or made.name in _CASTS:
            return inner
        return made.func(inner[0], *made.args[1:], **made.kwargs), inner[1]

    def log_of_any(self, value: Any, depth: int) -> Log:
        """The logarithm of a factor, which need not be made of exponentials."""
        found = self.log(value, depth)
        if found is not None:
            return found
        tensor = torch.as_tensor(value)
        return (tensor.log(), "log(c)") if bool((tensor > 0).all()) else None

    def log_of_rest(self, value: Any, depth: int) -> Log:
        """The logarithm of 1 - value."""
        made = self.of(value)
        if made is None or depth == 0:
            return None
        if made.name == "sigmoid":
            return functional.logsigmoid(-made.args[0]), "logsigmoid(-z)"
        shown = self._seen_through(made, lambda part: self.log_of_rest(part, depth - 1))
        if shown is not None:
            return shown
        found = self.log(value, depth)
        return (torch.log(-torch.expm1(found[0])), f"log(-expm1({found[1]}))") if found else None


def _of_exp(_of: Formulas, made: Formula, _depth: int) -> Log:
    return made.args[0], "z"


def _of_softmax(_of: Formulas, made: Formula, _depth: int) -> Log:
    dim = made.kwargs.get("dim", made.args[1] if len(made.args) > 1 else None)
    return (
        (functional.log_softmax(made.args[0], dim), "log_softmax(z)") if dim is not None else None
    )


def _of_sigmoid(_of: Formulas, made: Formula, _depth: int) -> Log:
    return functional.logsigmoid(made.args[0]), "logsigmoid(z)"


def _of_cosh(_of: Formulas, made: Formula, _depth: int) -> Log:
    z = made.args[0]
    return torch.logaddexp(z, -z) - math.log(2.0), "logaddexp(z, -z) - log(2)"


def _of_product(of: Formulas, made: Formula, depth: int) -> Log:
    p, q = made.args
    if of.log(p, depth) is None and of.log(q, depth) is None:
        return None
    one, other = of.log_of_any(p, depth), of.log_of_any(q, depth)
    return (one[0] + other[0], f"{one[1]} + {other[1]}") if one and other else None


def _of_quotient(of: Formulas, made: Formula, depth: int) -> Log:
    p, q = made.args[:2] if made.name != "rdiv" else made.args[1::-1]
    if of.log(p, depth) is None and of.log(q, depth) is None:
        return None
    one, other = of.log_of_any(p, depth), of.log_of_any(q, depth)
    return (one[0] - other[0], f"{one[1]} - {other[1]}") if one and other else None


def _of_sum(of: Formulas, made: Formula, depth: int) -> Log:
    inner = of.log(made.args[0], depth)
    if inner is None:
        return None
    values, text = inner
    dim = made.kwargs.get("dim", made.args[1] if len(made.args) > 1 else None)
    keep = made.kwargs.get("keepdim", made.args[2] if len(made.args) > 2 else False)
    dims = tuple(range(values.dim())) if dim is None else dim
    total = torch.logsumexp(values, dims, keepdim=keep)
    if made.name == "mean":
        total = total - math.log(values.numel() / max(total.numel(), 1))
    return total, f"logsumexp({text})"


def _of_addition(of: Formulas, made: Formula, depth: int) -> Log:
    p, q = made.args[:2]
    if made.kwargs or (of.log(p, depth) is None and of.log(q, depth) is None):
        return None
    known, rest = (p, q) if of.log(p, depth) else (q, p)
    if not isinstance(rest, Tensor) and rest == 1:
        z = of.log(known, depth)
        return (functional.softplus(z[0]), f"softplus({z[1]})") if z else None
    one, other = of.log_of_any(p, depth), of.log_of_any(q, depth)
    return _added(one, other) if one and other else None


def _added(one: tuple[Tensor, str], other: tuple[Tensor, str]) -> Log:
    p, q = torch.broadcast_tensors(one[0], other[0].to(one[0].dtype))
    return torch.logaddexp(p, q), f"logaddexp({one[1]}, {other[1]})"


def _of_rest(of: Formulas, made: Formula, depth: int) -> Log:
    whole, part = made.args[:2] if made.name != "rsub" else made.args[1::-1]
    is_one = not isinstance(whole, Tensor) and whole == 1 and not made.kwargs
    return of.log_of_rest(part, depth) if is_one else None


def _of_power(of: Formulas, made: Formula, depth: int) -> Log:
    inner = of.log(made.args[0], depth)
    power = {"sqrt": 0.5, "rsqrt": -0.5, "square": 2.0, "reciprocal": -1.0}.get(made.name)
    factor = made.args[1] if power is None else power
    return (factor * inner[0], f"{inner[1]} * c") if inner else None


def _of_prod(of: Formulas, made: Formula, depth: int) -> Log:
    inner = of.log(made.args[0], depth) or _log_of_positive(made.args[0])
    if inner is None:
        return None
    name = "sum" if made.name == "prod" else "cumsum"
    return getattr(inner[0], name)(*made.args[1:], **made.kwargs), f"{inner[1]}.{name}()"


def _log_of_positive(value: Any) -> Log:
    is_fit = isinstance(value, Tensor) and bool((value > 0).all())
    return (value.log(), "log(x)") if is_fit else None


_Rule: TypeAlias = Callable[[Formulas, Formula, int], Log]
_RULES: Mapping[str, _Rule] = {
    "exp": _of_exp,
    "softmax": _of_softmax,
    "sigmoid": _of_sigmoid,
    "cosh": _of_cosh,
    **dict.fromkeys(("mul", "multiply", "rmul"), _of_product),
    **dict.fromkeys(("div", "truediv", "true_divide", "rdiv"), _of_quotient),
    **dict.fromkeys(("sum", "mean"), _of_sum),
    **dict.fromkeys(("add", "radd"), _of_addition),
    **dict.fromkeys(("sub", "rsub"), _of_rest),
    **dict.fromkeys(("pow", "sqrt", "rsqrt", "square", "reciprocal"), _of_power),
    **dict.fromkeys(("prod", "cumprod"), _of_prod),
}

# -- what has the same value as a call ---------------------------------------------------------

_BASES = {"log": math.e, "log2": 2.0, "log10": 10.0}


def stable_form(of: Formulas, formula: Formula) -> Log:
    """A call with the same value on paper that never forms what fails; None if none is known."""
    rule = _FORMS.get(formula.name)
    return rule(of, formula) if rule is not None and formula.args else None


def _logarithm(of: Formulas, formula: Formula) -> Log:
    found = of.log(formula.args[0])
    base = math.log(_BASES[formula.name])
    return (found[0] / base if base != 1.0 else found[0], found[1]) if found else None


def _quotient(of: Formulas, formula: Formula) -> Log:
    """The exponential of a difference of logarithms."""
    found = _of_quotient(of, formula, _DEEPEST) if of.log(formula.args[1]) else None
    return (found[0].exp(), f"exp({found[1]})") if found else None


def _root(of: Formulas, formula: Formula) -> Log:
    is_root = formula.name == "sqrt" or formula.args[1] == 0.5
    return _root_of_squares(of, formula.args[0]) if is_root else None


def _log_odds(of: Formulas, formula: Formula) -> Log:
    argument = formula.args[0]
    one, rest = of.log(argument), of.log_of_rest(argument, _DEEPEST)
    return (one[0] - rest[0], f"{one[1]} - {rest[1]}") if one and rest else None


def _log_of_one_more(of: Formulas, formula: Formula) -> Log:
    argument = formula.args[0]
    made = of.of(argument)
    if made is not None and made.name == "neg":
        return of.log_of_rest(made.args[0], _DEEPEST)
    found = of.log(argument)
    return (functional.softplus(found[0]), f"softplus({found[1]})") if found else None


def _root_of_squares(of: Formulas, argument: Any) -> Log:
    """A norm, whose gradient at 0 is 0."""
    total = of.of(argument)
    if total is not None and (root := _squared(of, argument)) is not None:
        return root.abs(), "abs(x)"
    if total is None or total.name != "sum" or not isinstance(total.args[0], Tensor):
        return None
    root = _squared(of, total.args[0])
    if root is None:
        return None
    names = dict(zip(("dim", "keepdim"), total.args[1:], strict=False))
    return torch.linalg.vector_norm(root, **{**names, **total.kwargs}), "vector_norm(x)"


def _squared(of: Formulas, value: Any) -> Tensor | None:
    """What a tensor is the square of."""
    made = of.of(value)
    if made is None:
        return None
    is_power = made.name == "square" or (made.name == "pow" and made.args[1] == 2)
    if is_power or (made.name == "mul" and made.args[0] is made.args[1]):
        root = made.args[0]
        return root if isinstance(root, Tensor) else None
    return None


def _with_logits(of: Formulas, formula: Formula) -> Log:
    made = of.of(formula.args[0])
    if made is None or made.name != "sigmoid" or len(formula.args) > 2:
        return None
    known = {k: v for k, v in formula.kwargs.items() if k in ("weight", "reduction")}
    loss = functional.binary_cross_entropy_with_logits(made.args[0], formula.args[1], **known)
    return loss, "binary_cross_entropy_with_logits(z)"


def _spread(of: Formulas, formula: Formula) -> Log:
    """The mean of squares less the square of the mean, from the deviations."""
    one, other = of.of(formula.args[0]), formula.args[1]
    if one is None or one.name != "mean":
        return None
    root, mean = _squared(of, one.args[0]), _squared(of, other)
    averaged = of.of(mean) if mean is not None else None
    if root is None or averaged is None or averaged.args[0] is not root:
        return None
    kept = {**one.kwargs, "keepdim": True} if len(one.args) > 1 or one.kwargs else {}
    deviations = root - root.mean(*one.args[1:2], **kept)
    return deviations.square().mean(*one.args[1:], **one.kwargs), "(x - mean)².mean()"


_FORMS: Mapping[str, Callable[[Formulas, Formula], Log]] = {
    **dict.fromkeys(_BASES, _logarithm),
    "log1p": _log_of_one_more,
    "logit": _log_odds,
    **dict.fromkeys(("div", "truediv", "true_divide"), _quotient),
    **dict.fromkeys(("sqrt", "pow"), _root),
    "binary_cross_entropy": _with_logits,
    "sub": _spread,
}
