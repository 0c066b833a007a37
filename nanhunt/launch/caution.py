"""Our own failures, kept away from the program: its calls are made exactly once, whatever we do."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nanhunt.guarding.observer import Observer
from nanhunt.recorder import Recorder

# Events that are held, between twice as many and these: some iterations.
KEPT = 10_000
# So many may come without a backward, a step or an evaluation at which to let go of the older ones.
_CEILING = 100_000


class Cautiously:
    """Gives up at an error of ours inside; cheaper than a generator, for every step has several."""

    __slots__ = ("_give_up",)

    def __init__(self, give_up: Callable[[Exception], object]) -> None:
        self._give_up = give_up

    def __enter__(self) -> None:
        """Nothing is needed."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, Exception):
            self._give_up(error)
            return True
        return False


class OnlyOnce:
    """A call of the program that is made while we do something around it."""

    __slots__ = ("error", "is_made", "returned", "run")

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run
        self.is_made = False
        self.returned: Any = None
        self.error: BaseException | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make it, and remember how it ended."""
        self.is_made = True
        try:
            self.returned = self.run(*args, **kwargs)
        except BaseException as error:
            self.error = error
            raise
        return self.returned


def around(
    method: Callable[..., Any],
    call: tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]],
    give_up: Callable[[Exception], object],
) -> Any:
    """Have a method of ours make a call of the program; where it fails, make the call without."""
    run, args, kwargs = call
    once = OnlyOnce(run)
    try:
        return method(once, args, kwargs)
    except Exception as error:
        if error is once.error:
            raise
        give_up(error)
    if once.error is not None:  # pragma: no cover - ours came while the program's was on its way
        raise once.error
    return once.returned if once.is_made else run(*args, **kwargs)


class CautiousRecorder(Recorder):
    """A recorder under a whole program: it can be switched off at once, also in its own failure."""

    def __init__(self, give_up: Callable[[Exception], object]) -> None:
        super().__init__(execute=self._run)
        self.is_off = False
        self.observer: Observer | None = None
        self._give_up = give_up
        self._ran: tuple[Any, Any, BaseException | None] | None = None
        self._ceiling = _CEILING

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        try:
            returned = func(*args, **kwargs)
        except BaseException as error:
            self._ran = (args, None, error)
            raise
        self._ran = (args, returned, None)
        return returned

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if self.is_off:
            return func(*args, **(kwargs or {}))
        try:
            returned = super().__torch_dispatch__(func, types, args, kwargs)
            if self.position > self._ceiling:
                self._relieve()
        except Exception as error:
            ran, self._ran = self._ran, None
            is_ours = ran is None or ran[0] is not args or ran[2] is not error
            if not is_ours:
                raise
            self._give_up(error)
            if ran is not None and ran[0] is args:
                return ran[1]
            return func(*args, **(kwargs or {}))
        self._ran = None  # it would keep tensors alive
        return returned

    def _relieve(self) -> None:
        """Let go of something: no backward and no step has come by for long."""
        if self.observer is not None:
            self.observer.forget()
        self._ceiling = self.position + _CEILING
