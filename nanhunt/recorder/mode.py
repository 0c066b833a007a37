"""The dispatch mode: one plain tuple per aten op of the forward, the backward and the optimizer."""

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from nanhunt import measurement
from nanhunt.recorder.flow import Flow, repair
from nanhunt.recorder.frames import is_in_backward, read_frame, user_call
from nanhunt.recorder.kept import Kept
from nanhunt.recorder.oblivion import let_go
from nanhunt.recorder.schema import INFOS, Call, inputs_of, op_info
from nanhunt.records import OpEvent, Passage, Phase, Sink, TensorFacts
from nanhunt.structure import named_tensors

# Private names of torch that the recorder stands on; checked with the versions in pyproject.toml.
_current_node: Callable[[], Any] = torch._C._current_autograd_node  # noqa: SLF001
_sequence_number: Callable[[], int] = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]  # noqa: SLF001
_graph_task: Callable[[], int] = torch._C._current_graph_task_id  # noqa: SLF001
_is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor  # noqa: SLF001
_unwrap: Callable[[Tensor], Tensor] = torch._C._functorch.get_unwrapped  # noqa: SLF001

ROOT = "(model)"  # the module path of the root, whose own name is empty
_NO_NUMBER = 2**64 - 1  # what AccumulateGrad answers
_NO_TASK = -1  # no backward is running in this thread


def unrecorded() -> contextlib.AbstractContextManager[Any]:
    """Measure below every dispatch mode: neither recorded nor changed by an intervention."""
    guard: contextlib.AbstractContextManager[Any] = torch._C._DisableTorchDispatch()  # noqa: SLF001
    return guard


Execute: TypeAlias = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class Scope:
    """What a recorder does besides naming the ops and following non-finite values.

    With `modules` it measures what passes each module, in both directions; with `shapes` it notes
    inputs and outputs of every op, and not only of those that met a non-finite value. `repair`
    are the indices of events whose newborn elements are replaced by finite numbers at birth. With
    `keep`, so many bytes of what the ops were given and returned are kept, the latest.
    """

    modules: bool = False
    shapes: bool = False
    repair: frozenset[int] = frozenset()
    keep: int = 0


class Recorder(TorchDispatchMode):
    """Records the ops that run inside `with recorder.recording(model)`.

    Set `stage` to what runs when neither a backward nor an optimizer does. `note_state` before the
    step tells which tensors were non-finite already, `sources_of` after it who made a tensor
    non-finite. The hot path appends a tuple; `events` makes the records. `execute` runs an op,
    where it is not to run as it is.
    `scope` says what it does besides.

    It is meant to be the lowest mode: what it measures is not seen by those above it, but would be
    by one below.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True would wrap the hot path in the compiler's guard, whose import takes seconds; the
        # step runs eagerly anyway, see `compiled_code_run_eagerly`.
        return False

    def __init__(self, execute: Execute | None = None, scope: Scope = Scope()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._execute = execute
        self.stage: Phase = "forward"
        self._outer_stage: Phase = "forward"
        self._flow = Flow()
        self._raw: list[tuple[Any, ...]] = []
        self.step = 0
        self._modules: list[str] = []
        self._names: dict[int, str] = {}
        self._node: Any = None
        self._node_facts: tuple[str | None, int | None] = (None, None)
        self._node_run = 0
        self._is_python_node = False
        self._is_accumulation = False
        self.outputs: list[tuple[str, Tensor]] = []
        self.passages: list[Passage] = []
        self._scope = scope
        self.kept = Kept(scope.keep) if scope.keep else None
        self._handles: list[Any] = []
        # Called at once: with the index of an event that is a birth; with a module that was called
        # from outside of any other.
        self.on_birth: Callable[[int], None] | None = None
        self.on_root: Callable[[nn.Module], None] | None = None

    @property
    def state(self) -> tuple[Sink, ...]:
        """The tensors that were non-finite before any recorded op wrote to them."""
        return tuple(self._flow.state)

    def note_state(self, sink: Sink, tensor: Tensor) -> None:
        """Tell that a tensor is non-finite before the step starts."""
        self._flow.note_state(sink, tensor)

    def sources_of(self, tensor: Tensor) -> tuple[int, ...]:
        """Who left the non-finite elements of a tensor, as in `OpEvent.sources`."""
        return self._flow.sources_of(tensor)

    def events(self) -> tuple[OpEvent, ...]:
        """Make the records of everything seen so far."""
        return tuple(_event(index, raw) for index, raw in enumerate(self._raw))

    def event(self, index: int) -> OpEvent:
        """Make the record of one event."""
        return _event(index, self._raw[index])

    @property
    def position(self) -> int:
        """Number of events that are held."""
        return len(self._raw)

    def name_modules(self, names: Mapping[int, str]) -> None:
        """Give modules, by their `id`, a path under which their ops are recorded."""
        self._names.update(names)

    def let_go(self, before: int) -> None:
        """Forget the first events, save those behind non-finite values that are still in use."""
        let_go(self._flow, self._raw, before)

    def next_step(self, step: int) -> None:
        """Go on with another training step, and keep of those before what it may depend on."""
        self.step = step
        self.stage = "forward"
        self.passages.clear()
        if self._flow.is_settled():
            self._raw.clear()

    @contextlib.contextmanager
    def recording(self, model: nn.Module | None = None) -> Iterator["Recorder"]:
        """Record everything that runs inside; hooks are gone afterwards whatever happens."""
        if model is not None:
            self._names = {id(module): name or ROOT for name, module in model.named_modules()}
        modules = nn.modules.module
        enter = modules.register_module_forward_pre_hook(self._enter_module)
        leave = modules.register_module_forward_hook(self._leave_module, always_call=True)
        stepping = register_optimizer_step_pre_hook(self._enter_optimizer)
        stepped = register_optimizer_step_post_hook(self._leave_optimizer)
        try:
            with compiled_code_run_eagerly(), self:
                yield self
        finally:
            for hook in (enter, leave, stepping, stepped):
                hook.remove()
            self._modules.clear()
            self.outputs.clear()
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self._node = None

    def _enter_module(self, module: nn.Module, _args: Any) -> None:
        # A module from outside the model, a loss say, has no path: what it calls stays where it is.
        outer = self._modules[-1] if self._modules else ""
        if self.on_root is not None and not self._modules:
            self.on_root(module)
        self._modules.append(self._names.get(id(module), outer))

    def _leave_module(self, module: nn.Module, _args: Any, output: Any) -> None:
        if self._modules:
            self._modules.pop()
        name = self._names.get(id(module))
        if name == ROOT:
            named = named_tensors(output, "output")
            self.outputs.extend((path, _unwrapped(tensor)) for path, tensor in named)
        if self._scope.modules and name is not None:
            self._watch(name, output)

    def _enter_optimizer(self, *_: Any) -> None:
        self._outer_stage, self.stage = self.stage, "optimizer"

    def _leave_optimizer(self, *_: Any) -> None:
        self.stage = self._outer_stage

    def _watch(self, module: str, output: Any) -> None:
        """Measure what a module returned, and the gradient when it arrives there."""
        for _, returned in named_tensors(output):
            tensor = _unwrapped(returned)
            with unrecorded():
                self._note(measurement.read_passage(module, "forward", tensor))
            if tensor.requires_grad:
                arrived = functools.partial(self._gradient_arrived, module)
                self._handles.append(tensor.register_hook(arrived))

    def _gradient_arrived(self, module: str, gradient: Tensor) -> None:
        with unrecorded():
            self._note(measurement.read_passage(module, "backward", gradient))

    def _note(self, passage: Passage | None) -> None:
        if passage is not None:
            self.passages.append(passage)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        info = INFOS.get(id(func)) or op_info(func)
        node = _current_node()
        if node is not self._node:
            self._enter_node(node)
        flow = self._flow
        # Read before the op runs, which may overwrite what it reads.
        given = shapes = None
        if flow.poison or info.is_update:
            given = flow.measure_inputs(inputs_of(args, kwargs), info)
        if self._scope.shapes:
            shapes = [(tensor.shape, tensor.dtype) for tensor in inputs_of(args, kwargs)]
        if self._execute is None:
            returned = func(*args, **kwargs) if kwargs else func(*args)
        else:
            returned = self._execute(func, args, kwargs or {})
        is_plain = type(returned) is Tensor and not info.mutated
        outputs = [returned] if is_plain else Call(info, args, kwargs or {}).outputs(returned)
        if self.kept is not None:
            self.kept.add(Call(info, args, kwargs or {}), outputs)
        place, applier = user_call(past_engine=self._is_accumulation)
        met = None
        # Nearly every op ends here: nothing non-finite is known, and the screen clears the output.
        if flow.poison or (info.is_screened and measurement.suspects(outputs)):
            call = Call(info, args, kwargs or {})
            index = len(self._raw)
            if index in self._scope.repair:
                repair(outputs, given, is_backward=node is not None)
            met = flow.follow(call, node, given, outputs, index)
        self._raw.append(
            (
                # `loss_fn` may differentiate too: a penalty on a gradient, a loss in parts.
                "backward" if node is not None or _graph_task() != _NO_TASK else self.stage,
                info.name,
                self._node_facts,
                # A backward that builds no graph makes no nodes; the last number is the forward's.
                _sequence_number() - 1 if node is None or torch.is_grad_enabled() else None,
                self._node_run,
                self._modules[-1] if self._modules else "",
                place,
                applier,
                self._is_python_node and place is not None and not is_in_backward(),
                shapes,
                [(t.shape, t.dtype) for t in outputs] if shapes is not None else None,
                _dtype_of(outputs),
                self.step,
                met,
            )
        )
        if met is not None and met.birth is not None and self.on_birth is not None:
            self.on_birth(len(self._raw) - 1)
        return returned

    def _enter_node(self, node: Any) -> None:
        # Holding the node keeps its identity: the next one cannot get the same address.
        self._node = node
        self._node_run += 1
        self._is_python_node = isinstance(node, BackwardCFunction)
        self._is_accumulation = False
        if node is None:
            self._node_facts = (None, None)
            return
        number = node._sequence_nr()  # noqa: SLF001 - no public name
        # A gradient is added to `.grad` by no line but the one that called the backward.
        self._is_accumulation = number == _NO_NUMBER
        name = node.name().removeprefix("torch::autograd::")
        self._node_facts = (name, None if number == _NO_NUMBER else number)


def _unwrapped(tensor: Tensor) -> Tensor:
    """The tensor with memory below the wrappers of `torch.func`'s transforms."""
    while _is_wrapped(tensor):
        tensor = _unwrap(tensor)
    return tensor


@contextlib.contextmanager
def compiled_code_run_eagerly() -> Iterator[None]:
    """Run compiled functions eagerly, and leave them compiled.

    Without this, one call under a dispatch mode leaves them uncompiled for the rest of the process,
    and the compiler traces the mode too. Where it was never imported there is nothing compiled, and
    importing it takes seconds.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        # Compiled modules warn of hooks like ours, which are gone when they run compiled again.
        warnings.filterwarnings("ignore", message=".*when there are global hooks on modules")
        yield


def _dtype_of(outputs: Sequence[Tensor]) -> torch.dtype | None:
    """The dtype of the first output that has NaN at all, else of the first output."""
    for tensor in outputs:
        dtype = tensor.dtype
        if dtype not in measurement.EXACT:
            return dtype
    return outputs[0].dtype if outputs else None


def _facts(pairs: Iterable[tuple[torch.Size, torch.dtype]]) -> tuple[TensorFacts, ...]:
    return tuple(TensorFacts(tuple(shape), measurement.dtype_name(dtype)) for shape, dtype in pairs)


def _event(index: int, raw: tuple[Any, ...]) -> OpEvent:
    (stage, op, (node, number), made, run, module, place, applier, hooked, given, outputs, dtype,
     step, met) = raw  # fmt: skip
    return OpEvent(
        index=index,
        phase=stage,
        op=op,
        inputs=met.inputs if met else _facts(given or ()),
        outputs=met.outputs if met else _facts(outputs or ()),
        dtype=measurement.dtype_name(dtype) if dtype is not None else "",
        node=node,
        number=number,
        made=made,
        node_run=run,
        module=module,
        frame=read_frame(*place) if place else None,
        caller=read_frame(*applier) if applier else None,
        in_hook=hooked,
        sources=met.sources if met else (),
        birth=met.birth if met else None,
        asked=bool(met and met.asked),
        step=step,
    )
