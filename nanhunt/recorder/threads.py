"""Modes of ours go on in the Python threads that the program starts.

A dispatch mode stands on the stack of one thread. While `carried_into_threads` is active, a thread
that is started under modes of ours has one of its own for each of them, and so has every call that
is handed to a `ThreadPoolExecutor`, whose workers may be older than the block.
"""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_torch_dispatch_stack,
    _push_on_torch_dispatch_stack,
)

from nanhunt.interventions import OwnMode

_TAG = "nanhunt thread"  # under which an autograd node's own dictionary holds its thread


class Carried(TorchDispatchMode):
    """Hands the ops of one thread on to a mode of ours, until the block is over.

    It is put on the stack as torch does between two dispatches: `with` would also set switches of
    the whole process, and put them back while another thread still needs them.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as for the modes of ours

    def __init__(self, acting: OwnMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.acting: OwnMode | None = acting

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        acting = self.acting
        if acting is None:
            return func(*args, **(kwargs or {}))
        return acting.__torch_dispatch__(func, types, args, kwargs)

    def leave(self) -> None:
        """The thread is over."""
        acting, self.acting = self.acting, None
        if acting is not None:
            acting.finish()


class _Block:
    """What was carried since a block was entered."""

    def __init__(self) -> None:
        self.carried: list[Carried] = []


_lock = threading.Lock()
_blocks: list[_Block] = []
_replaced: list[Callable[..., Any]] = []  # what stood where the hooks stand now
_submitting = threading.local()


@contextlib.contextmanager
def carried_into_threads() -> Iterator[None]:
    """Let modes of ours go on in threads that are started inside, in the same order.

    Covered are `threading.Thread` and what is made of it, from `start` on, and calls handed to a
    `ThreadPoolExecutor`. A thread that was started before the block and takes its work elsewhere
    (a queue, a `multiprocessing.pool.ThreadPool`), or one that no `Thread` stands for, is not:
    nobody but itself could enter a mode there. Autocast, grad mode and the modes of the program
    itself do not pass from thread to thread, here as without us. What still runs when the block is
    over runs on as if there were no mode. Blocks may stand inside each other.
    """
    block = _Block()
    with _lock:
        if not _blocks:
            _install()
        _blocks.append(block)
    try:
        yield
    finally:
        with _lock:
            _blocks.remove(block)
            if not _blocks:
                _uninstall()
        for mode in block.carried:
            mode.acting = None


def acting_here() -> Iterator[OwnMode]:
    """The modes that were carried into the running thread, the lowest first."""
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, Carried) and mode.acting is not None:
            yield mode.acting


def _install() -> None:
    start, submit = threading.Thread.start, ThreadPoolExecutor.submit
    _replaced.extend((start, submit))

    @functools.wraps(start)
    def starting(thread: threading.Thread) -> None:
        # A pool starts its workers where it is handed a call, and it is the call that is covered.
        carried = [] if getattr(_submitting, "is_on", False) else _carry()
        if not carried:
            start(thread)
            return
        own, run = vars(thread).get("run"), thread.run

        def put_back() -> None:
            vars(thread).pop("run", None)
            if own is not None:
                vars(thread)["run"] = own

        def running() -> None:
            put_back()
            _run_under(carried, run)

        vars(thread)["run"] = running
        try:
            start(thread)
        except BaseException:
            put_back()
            raise

    @functools.wraps(submit)
    def submitting(executor: ThreadPoolExecutor, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        carried = _carry()
        call = functools.partial(_run_under, carried, fn) if carried else fn
        outer, _submitting.is_on = getattr(_submitting, "is_on", False), bool(carried)
        try:
            return submit(executor, call, *args, **kwargs)
        finally:
            _submitting.is_on = outer

    threading.Thread.start = starting  # type: ignore[method-assign]
    ThreadPoolExecutor.submit = submitting  # type: ignore[method-assign]


def _uninstall() -> None:
    start, submit = _replaced
    _replaced.clear()
    threading.Thread.start = start  # type: ignore[method-assign]
    ThreadPoolExecutor.submit = submit  # type: ignore[method-assign]


def _carry() -> list[Carried]:
    """One mode for each of ours in the running thread, to stand on the stack of another."""
    stack = _get_current_dispatch_mode_stack()
    ours = [mode.acting if isinstance(mode, Carried) else mode for mode in stack]
    carried = [Carried(mode.for_thread()) for mode in ours if isinstance(mode, OwnMode)]
    with _lock:
        if not _blocks:
            return []  # the block ended in the meantime
        _blocks[-1].carried.extend(carried)
    return carried


def _run_under(
    carried: Sequence[Carried], function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    for mode in carried:
        _push_on_torch_dispatch_stack(mode)
    try:
        return function(*args, **kwargs)
    finally:
        for mode in reversed(carried):
            _pop_torch_dispatch_stack()
            mode.leave()


# -- which thread made a node ----------------------------------------------------------------------


class Tags:
    """Writes on autograd nodes which thread made them.

    Every thread numbers its nodes from 0. A node hangs on an op's output only after the op was
    dispatched, so it is written on when the next op comes.
    """

    def __init__(self, thread: int) -> None:
        self._thread = thread
        self._pending: list[tuple[weakref.ref[Tensor], int]] = []

    def note(self, outputs: Sequence[Tensor], number: int | None) -> None:
        """Tell of an op that just ran, and the number of the node that it made."""
        if number is not None:
            self._pending = [(weakref.ref(tensor), number) for tensor in outputs]

    def write(self) -> None:
        """Write on the nodes of the op before."""
        for reference, number in self._pending:
            tensor = reference()
            if tensor is None:
                continue
            # To ask a view may make it a new node; where it was written to, its base has one.
            with contextlib.suppress(RuntimeError):
                owner = tensor._base if tensor._is_view() else tensor  # noqa: SLF001 - no public name
                node = owner.grad_fn if owner is not None else None
                # The node that stands for a write to a view is made right after the op's own.
                if node is not None and node._sequence_nr() in (number, number + 1):  # noqa: SLF001
                    node.metadata.setdefault(_TAG, self._thread)
        self._pending = []


def thread_of(node: Any) -> int | None:
    """The number of the thread that made a node; None for the main thread, or where unknown."""
    thread: int | None = node.metadata.get(_TAG)
    return thread
