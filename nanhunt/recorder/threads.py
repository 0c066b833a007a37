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

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from nanhunt.interventions import OwnCalls, OwnMode

# Private names of torch that this stands on; checked with the versions in pyproject.toml.
_push: Callable[[TorchDispatchMode], None] = torch._C._push_on_torch_dispatch_stack  # noqa: SLF001
_pop: Callable[[None], object] = torch._C._pop_torch_dispatch_stack  # noqa: SLF001

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
        return acting.__torch_dispatch__(func, types, args, kwargs)  # type: ignore[no-untyped-call]

    def leave(self) -> None:
        """The thread is over."""
        acting, self.acting = self.acting, None
        if acting is not None:
            acting.finish()


class CarriedCalls(TorchFunctionMode):
    """Hands the calls of one thread on to a mode of ours, until the block is over."""

    def __init__(self, acting: OwnCalls) -> None:
        super().__init__()
        self.acting: OwnCalls | None = acting

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        acting = self.acting
        if acting is None:
            return func(*args, **(kwargs or {}))
        return acting.__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]

    def leave(self) -> None:
        """The thread is over."""
        self.acting = None


class _Block:
    """What was carried since a block was entered, as far as its threads still run."""

    def __init__(self) -> None:
        self.carried: weakref.WeakSet[Carried | CarriedCalls] = weakref.WeakSet()


_lock = threading.Lock()
_blocks: list[_Block] = []
_replaced: list[tuple[type, str, Any]] = []  # what stood where the hooks stand now
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
        for mode in list(block.carried):
            mode.acting = None


def acting_here() -> Iterator[OwnMode]:
    """The modes that were carried into the running thread, the lowest first."""
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, Carried) and mode.acting is not None:
            yield mode.acting


def _install() -> None:
    start: Callable[..., None] = threading.Thread.start
    submit: Callable[..., Any] = ThreadPoolExecutor.submit
    _replaced.extend(((threading.Thread, "start", start), (ThreadPoolExecutor, "submit", submit)))

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

    for (owner, name, _), hook in zip(_replaced, (starting, submitting), strict=True):
        setattr(owner, name, hook)


def _uninstall() -> None:
    for owner, name, function in _replaced:
        setattr(owner, name, function)
    _replaced.clear()


def _carry() -> list[Carried | CarriedCalls]:
    """One mode for each of ours in the running thread, to stand on the stacks of another."""
    stack = [*_get_current_dispatch_mode_stack(), *_get_current_function_mode_stack()]
    ours = [mode.acting if isinstance(mode, Carried | CarriedCalls) else mode for mode in stack]
    carried: list[Carried | CarriedCalls] = [
        *(Carried(mode.for_thread()) for mode in ours if isinstance(mode, OwnMode)),
        *(CarriedCalls(mode) for mode in ours if isinstance(mode, OwnCalls)),
    ]
    with _lock:
        if not _blocks:
            return []  # the block ended in the meantime
        _blocks[-1].carried.update(carried)
    return carried


def _run_under(
    carried: Sequence[Carried | CarriedCalls],
    function: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    with contextlib.ExitStack() as stack:
        for mode in carried:
            stack.callback(mode.leave)
            if isinstance(mode, CarriedCalls):
                stack.enter_context(mode)
            else:
                _push(mode)
                stack.callback(_pop, None)
        return function(*args, **kwargs)


# -- which thread made a node ----------------------------------------------------------------------


class Tags:
    """Writes on autograd nodes which thread made them.

    Every thread numbers its nodes from 0. A node hangs on an op's output only after the op was
    dispatched, so it is written on when the next op comes.
    """

    def __init__(self, thread: int) -> None:
        self._thread = thread
        self._pending: list[tuple[weakref.ref[Tensor], int, bool]] = []

    def note(self, outputs: Sequence[Tensor], number: int, *, is_written: bool) -> None:
        """Tell of an op that just ran, the number of its node, and whether it wrote in place."""
        self._pending = [(weakref.ref(tensor), number, is_written) for tensor in outputs]

    def write(self) -> None:
        """Write on the nodes of the op before."""
        for reference, number, is_written in self._pending:
            node, made = node_of(reference(), is_written=is_written)
            if node is not None and node._sequence_nr() == number + made:  # noqa: SLF001
                node.metadata[_TAG] = self._thread
        self._pending = []


def node_of(tensor: Tensor | None, *, is_written: bool) -> tuple[Any, int]:
    """The node that an op gave to its output, and how many it made before that one."""
    if tensor is None or not tensor._is_view():  # noqa: SLF001 - no public name
        return (tensor.grad_fn if tensor is not None else None), 0
    # To ask a view for its node may make it a new one. A write to a view gives its base a node
    # after the op's own.
    base = tensor._base  # noqa: SLF001 - as above
    return (base.grad_fn if base is not None and is_written else None), 1


def thread_of(node: Any) -> int | None:
    """The number of the thread that made a node; None for the main thread, or where unknown."""
    thread: int | None = node.metadata.get(_TAG)
    return thread
