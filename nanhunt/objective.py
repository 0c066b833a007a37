"""The objective of a hyper-parameter search, guarded: what is not finite becomes a penalty.

Neither torch nor Optuna is imported; a trial is known by what it can do.
"""

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NoReturn

from nanhunt.errors import NonFiniteError, UsageError

KEY = "nanhunt"  # the user attribute of a trial that holds the reason
Penalty = float | Sequence[float]
OnBad = Callable[[str, Exception | None], object]


def guard_objective(
    fn: Callable[..., Any] | None = None,
    *,
    penalty: Penalty = 1e6,
    prune: bool = False,
    on_bad: OnBad | None = None,
) -> Any:
    """Guard an objective: a value that is not finite, or an error, does not end the search.

    Also a decorator, with and without arguments. A healthy value comes back as it was returned.
    What is None, no number, NaN or infinite, and what raises, becomes the penalty or a pruned
    trial; where the first argument (or `trial`) is an Optuna trial, the reason is its user
    attribute "nanhunt". KeyboardInterrupt, SystemExit and `optuna.TrialPruned` pass through.

    Args:
        fn: `fn(trial, ...)` returns a number, or a tuple of them for several objectives.
        penalty: returned instead; for several objectives each gets it, or its own of a sequence.
            For what the trial's study maximises it counts as the negative of its size.
        prune: prune the trial instead; needs Optuna.
        on_bad: called with the reason and the error (None: a value was returned).

    Raises:
        UsageError: the objective cannot be called or is a coroutine, the penalty is not finite, or
            `prune` is asked for and Optuna is not installed.
    """
    _check(penalty, prune=prune)

    def guard(inner: Callable[..., Any]) -> Callable[..., Any]:
        if not callable(inner) or inspect.iscoroutinefunction(inner):
            raise UsageError(f"guard_objective takes a plain function of a trial; got {inner!r}")

        @wraps(inner, updated=())
        def guarded(*args: Any, **kwargs: Any) -> Any:
            error: Exception | None = None
            value: Any = None
            try:
                value = inner(*args, **kwargs)
                reason = _fault(value)
            except Exception as caught:
                if _is_pruned(caught):
                    raise
                reason, error = _told(caught), caught
            if not reason:
                return value
            trial: Any = args[0] if args else kwargs.get("trial")
            if hasattr(trial, "set_user_attr"):
                trial.set_user_attr(KEY, reason)
            if on_bad is not None:
                on_bad(reason, error)
            if prune:
                _prune(reason, error)
            return _punish(penalty, value, trial)

        return guarded

    return guard if fn is None else guard(fn)


def _check(penalty: Penalty, *, prune: bool) -> None:
    try:
        numbers = [float(p) for p in (penalty if isinstance(penalty, Sequence) else (penalty,))]
    except (TypeError, ValueError):
        numbers = []
    if not numbers or isinstance(penalty, str) or not all(map(math.isfinite, numbers)):
        raise UsageError(f"penalty is a finite number, or one for each objective; got {penalty!r}")
    if prune:
        from importlib.util import find_spec

        if find_spec("optuna") is None:
            raise UsageError("prune=True needs optuna, which is not installed; leave it out")


def _fault(value: Any) -> str:
    """Why a returned value cannot be an objective; empty where it can."""
    if isinstance(value, tuple | list):
        faults = [f"objective {i}: {why}" for i, one in enumerate(value) if (why := _fault(one))]
        return "; ".join(faults) if value else "the objective is an empty tuple"
    if value is None:
        return "the objective is None: nothing was returned"
    number = _number(value)
    if number is None:
        return f"the objective is no number: {_shown(value)}"
    return "" if math.isfinite(number) else f"the objective is {number:g}"


def _number(value: Any) -> float | None:
    """The number that Python, numpy or torch holds; None where it is not one."""
    if isinstance(value, str | bytes):
        return None
    try:
        plain = value.item() if hasattr(value, "item") else value  # arrays and tensors of one
        return float(plain)
    except OverflowError:
        return math.inf  # a whole number beyond every float
    except (TypeError, ValueError, RuntimeError):
        return None


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return f"{text[:80]}… ({type(value).__name__})" if len(text) > 80 else text


def _told(error: Exception) -> str:
    """The kind of an error and its first line; of a report its culprit and line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    head = f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
    report = error.report if isinstance(error, NonFiniteError) else None
    for culprit in getattr(report, "culprits", ())[:1]:
        op = culprit.op.removeprefix("aten::")
        half = "on the gradients" if culprit.is_on_gradients else "in its backward"
        phase = f"{op} {half}" if culprit.phase == "backward" else op
        place = f" at {culprit.file}:{culprit.line}" if culprit.file else ""
        cause = f" ({culprit.cause})" if culprit.cause else ""
        head = f"{head}; culprit: {phase}{place}{cause}"
    return head


def _is_pruned(error: Exception) -> bool:
    """Whether this is Optuna's own way to end a trial."""
    pruned = getattr(sys.modules.get("optuna"), "TrialPruned", None)
    return pruned is not None and isinstance(error, pruned)


def _prune(reason: str, error: Exception | None) -> NoReturn:
    import optuna

    raise optuna.TrialPruned(reason) from error


def _punish(penalty: Penalty, value: Any, trial: Any) -> float | tuple[float, ...]:
    """The penalty, as many times as there are objectives, each in its bad direction."""
    directions = tuple(getattr(getattr(trial, "study", None), "directions", ()))
    several = len(value) if isinstance(value, tuple | list) else 0
    count = len(directions) or several or 1
    given = tuple(penalty) if isinstance(penalty, Sequence) else (penalty,) * count
    signed = [
        -abs(each) if i < len(directions) and _is_maximised(directions[i]) else float(each)
        for i, each in enumerate(given)
    ]
    return signed[0] if len(signed) == 1 and several < 2 else tuple(signed)


def _is_maximised(direction: Any) -> bool:
    return str(getattr(direction, "name", direction)).upper() == "MAXIMIZE"
