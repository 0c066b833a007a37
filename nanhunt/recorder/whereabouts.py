"""Where the running thread is: the autograd node, the module, and the line of the user."""

from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

from nanhunt.interventions import OwnMode
from nanhunt.recorder.entries import Entry
from nanhunt.recorder.frames import NOBODY, Caller, Place, is_in_backward, user_call
from nanhunt.recorder.schema import OpInfo
from nanhunt.recorder.threads import thread_of
from nanhunt.records import Phase

# Private names of torch that this stands on; checked with the versions in pyproject.toml.
sequence_number: Callable[[], int] = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]  # noqa: SLF001
_is_grad_enabled: Callable[[], bool] = torch.is_grad_enabled
_graph_task: Callable[[], int] = torch._C._current_graph_task_id  # noqa: SLF001
_infra_mode: Callable[[Any], Any] = torch._C._get_dispatch_mode  # noqa: SLF001
_PROXY = torch._C._TorchDispatchModeKey.PROXY  # noqa: SLF001

_NO_NUMBER = 2**64 - 1  # what AccumulateGrad answers
_NO_TASK = -1  # no backward is running in this thread
_NODE_NAMES: dict[type, str] = {}  # of the classes of C++ nodes
_NO_NODE: tuple[str | None, int | None, int | None] = (None, None, None)


def is_traced() -> bool:
    """Whether `make_fx` writes down a program: it would write our own questions down as well."""
    return _infra_mode(_PROXY) is not None


class Whereabouts(OwnMode):
    """What a recorder is in the midst of, in one thread.

    What the ops of one node or one call of a module have in common is found when the first comes.
    """

    stage: Phase
    _step: int
    _threads: int

    def _begin(self, thread: int, modules: list[str], started_at: Place | None = None) -> None:
        """Start afresh in a thread that was started at a line, if it was not there already."""
        self.thread, self._modules = thread, modules
        self._started_at = started_at
        self._node: Any = None
        self._node_facts = _NO_NODE
        self._node_run = thread << 32  # apart from those of the other threads
        self._is_python_node = False
        # Of the ops that a node of C++ runs itself: their line, whether they make nodes, and
        # whether they are traced.
        self._line, self._builds_graph, self._is_traced = started_at, True, False
        self._caller: Caller = NOBODY  # of the last op that Python called
        self._backward: tuple[int, Place | None] = (_NO_TASK, None)
        self._about: tuple[Any, ...] | None = None  # what the next op has in common with the last

    def _change_module(self) -> list[str]:
        """The modules that the thread is in, one of which it is about to enter or to leave."""
        self._about, self._caller = None, NOBODY
        return self._modules

    def _enter_node(self, node: Any) -> None:
        # Holding the node keeps its identity: the next one cannot get the same address.
        self._node, self._about = node, None
        self._node_run += 1
        self._is_traced = is_traced()
        if node is None:
            self._node_facts, self._is_python_node = _NO_NODE, False
            self._line, self._builds_graph = self._started_at, True
            return
        self._line, self._builds_graph = None, _is_grad_enabled()
        self._is_python_node = False
        name = _NODE_NAMES.get(type(node))
        if name is None:
            name = node.name().removeprefix("torch::autograd::")
            self._is_python_node = isinstance(node, BackwardCFunction)
            if type(node).__name__ == name and not self._is_python_node:
                _NODE_NAMES[type(node)] = name  # some kinds share one class
        number = node._sequence_nr()  # noqa: SLF001 - no public name
        if number == _NO_NUMBER:
            # A gradient is added to `.grad` by no line but the one that called the backward.
            number, self._line = None, self._line_of_backward()
        self._node_facts = (name, number, thread_of(node) if self._threads else None)

    def _line_of_backward(self) -> Place | None:
        """The line that called the running backward."""
        task = _graph_task()
        if self._backward[0] != task:
            self._backward = task, user_call(past_engine=True)[0]
        return self._backward[1]

    def _note_surroundings(self) -> tuple[Any, ...]:
        module = self._modules[-1] if self._modules else ""
        self._about = (self._node_facts, self._node_run, module, self._step, self.thread)
        return self._about

    def _note_engine_op(self, info: OpInfo, dtype: torch.dtype | None) -> Entry:
        """The entry of an op that a node of C++ runs, as nearly all of a backward are."""
        about = self._about or self._note_surroundings()
        # A backward that builds no graph makes no nodes; the last number is the forward's.
        made = sequence_number() - 1 if self._builds_graph else None
        return ("backward", info, about, made, self._line, None, False, dtype, None, None)

    def _note_call(
        self, info: OpInfo, dtype: torch.dtype | None, caller: FrameType | None
    ) -> Entry:
        """The entry of an op that Python called."""
        node = self._node
        place, applier, _ = self._caller = user_call(caller, self._caller)
        return (
            # `loss_fn` may differentiate too: a penalty on a gradient, a loss in parts.
            "backward" if node is not None or _graph_task() != _NO_TASK else self.stage,
            info,
            self._about or self._note_surroundings(),
            sequence_number() - 1 if node is None or _is_grad_enabled() else None,
            place or (self._started_at if node is None else None),
            applier,
            self._is_python_node and place is not None and not is_in_backward(),
            dtype,
            None,
            None,
        )
