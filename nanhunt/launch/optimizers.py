"""What torch's hooks do not tell of optimizers: that one is made, that it drops gradients."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.optim import Optimizer


@contextlib.contextmanager
def led_to(
    made: Callable[[Optimizer], object], before_zero: Callable[[Optimizer], object]
) -> Iterator[None]:
    """Tell of each optimizer when it has its parameters, and before it drops their gradients."""
    start, zero = Optimizer.__init__, Optimizer.zero_grad

    @functools.wraps(start)
    def starting(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        made(self)

    @functools.wraps(zero)
    def zeroing(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        before_zero(self)
        zero(self, *args, **kwargs)

    laid: list[tuple[str, Any, Any]] = [
        ("__init__", start, starting),
        ("zero_grad", zero, zeroing),
    ]
    for name, _, wrapper in laid:
        setattr(Optimizer, name, wrapper)
    try:
        yield
    finally:
        for name, original, wrapper in laid:
            # What somebody else has wrapped meanwhile is theirs; ours inside of it only passes on.
            if vars(Optimizer).get(name) is wrapper:
                setattr(Optimizer, name, original)


def closure_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., Any] | None:
    """The closure that a step was given, if any; the first argument is the optimizer."""
    given = args[1] if len(args) > 1 else kwargs.get("closure")
    return given if callable(given) else None


def with_closure(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], closure: Callable[..., Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the step with another closure."""
    if len(args) > 1:
        return (args[0], closure, *args[2:]), dict(kwargs)
    return args, {**kwargs, "closure": closure}
