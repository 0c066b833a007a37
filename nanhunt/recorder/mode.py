"""The dispatch mode: one plain tuple per aten op of the forward, the backward and the optimizer."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from nanhunt.recorder.eager import compiled_code_run_eagerly
from nanhunt.recorder.entries import Entry, dtype_of, event_of, made_by, number_of
from nanhunt.recorder.flow import Flow, repair
from nanhunt.recorder.frames import ENGINE_CODE, NOBODY, user_call
from nanhunt.recorder.given import Given, Poison
from nanhunt.recorder.kept import Kept
from nanhunt.recorder.oblivion import let_go
from nanhunt.recorder.passing import Passing, unwrapped
from nanhunt.recorder.schema import INFOS, Call, OpInfo, inputs_of, op_info, tensors_in
from nanhunt.recorder.scope import PLAIN, Execute, Scope
from nanhunt.recorder.screen import AT_ONCE, Look
from nanhunt.recorder.threads import Tags, acting_here, carried_into_threads
from nanhunt.recorder.whereabouts import Whereabouts, is_traced, sequence_number
from nanhunt.records import OpEvent, Passage, Phase, Sink
from nanhunt.structure import named_tensors

# Private names of torch that the recorder stands on; checked with the versions in pyproject.toml.
_current_node: Callable[[], Any] = torch._C._current_autograd_node  # noqa: SLF001
_frame: Callable[[int], FrameType] = sys._getframe  # noqa: SLF001 - as in `frames`
_known_info: Callable[[int], OpInfo | None] = INFOS.get

ROOT = "(model)"  # the module path of the root, whose own name is empty


class Recorder(Whereabouts):
    """Records the ops that run inside `with recorder.recording(model)`.

    Set `stage` to what runs when neither a backward nor an optimizer does. `note_state` before the
    step tells which tensors were non-finite already, `sources_of` after it who made a tensor
    non-finite. The hot path appends a tuple; `events` makes the records. `execute` runs an op,
    where it is not to run as it is. `scope` says what it does besides, and `look` when it looks
    at what ops return.

    It is meant to be the lowest mode: what it measures is not seen by those above it, but would be
    by one below.
    """

    def __init__(
        self, execute: Execute | None = None, scope: Scope = PLAIN, look: Look | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._begin(0, [])
        self._threads = 0  # that were started, besides the one that the block stands in
        self._lock = threading.RLock()  # around what is known of non-finite values
        self._execute = execute
        self.stage: Phase = "forward"
        self._outer_stage: Phase = "forward"
        look = look or AT_ONCE
        self._is_cleared, self._is_clear_at_first = look.is_cleared, look.is_clear_at_first
        self._flow = Flow(look)
        self._poison = self._flow.poison
        self._raw: list[Entry] = []
        self._step = 0
        self._names: dict[int, str] = {}
        self.outputs: list[tuple[str, Tensor]] = []
        self._passing = Passing()
        self._scope = scope
        self.kept = Kept(scope.keep) if scope.keep else None
        self._is_kept = self.kept is not None
        self._is_busy = self._is_kept or scope.shapes
        self._shapes: list[tuple[torch.Size, torch.dtype]] = []  # of what an op is given
        self._append = self._raw.append
        self._repaired: set[int | None] = set()  # nodes that forward ops with repaired outputs made
        # Called at once: with the index of an event that is a birth; with a module that was called
        # from outside of any other.
        self.on_birth: Callable[[int], None] | None = None
        self.on_root: Callable[[nn.Module], None] | None = None

    @property
    def state(self) -> tuple[Sink, ...]:
        """The tensors that were non-finite before any recorded op wrote to them."""
        return tuple(self._flow.state)

    @property
    def passages(self) -> list[Passage]:
        """What passed the modules, if that is measured."""
        return self._passing.passages

    @property
    def step(self) -> int:
        """The training step that is recorded."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        """Go on with another."""
        self._step = step
        self._about = None

    def for_thread(self) -> "Recorder":
        """Return what records a thread that the running one is about to start."""
        return _Branch(self, self)

    def note_state(self, sink: Sink, tensor: Tensor) -> None:
        """Tell that a tensor is non-finite before the step starts."""
        self._flow.note_state(sink, tensor)

    def sources_of(self, tensor: Tensor) -> tuple[int, ...]:
        """Who left the non-finite elements of a tensor, as in `OpEvent.sources`."""
        return self._flow.sources_of(tensor)

    def events(self) -> tuple[OpEvent, ...]:
        """Make the records of everything seen so far."""
        return tuple(event_of(index, raw) for index, raw in enumerate(self._raw))

    def event(self, index: int) -> OpEvent:
        """Make the record of one event."""
        return event_of(index, self._raw[index])

    @property
    def position(self) -> int:
        """Number of events that are held."""
        return len(self._raw)

    def name_modules(self, names: Mapping[int, str]) -> None:
        """Give modules, by their `id`, a path under which their ops are recorded."""
        self._names.update(names)

    def let_go(self, before: int) -> None:
        """Forget the first events, save those behind non-finite values that are still in use."""
        with self._lock:
            let_go(self._flow, self._raw, before)

    def next_step(self, step: int) -> None:
        """Go on with another training step, and keep of those before what it may depend on."""
        self.step = step
        self.stage = "forward"
        self._passing.passages.clear()
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
            with compiled_code_run_eagerly(), carried_into_threads(), self:
                yield self
        finally:
            for hook in (enter, leave, stepping, stepped):
                hook.remove()
            self._modules.clear()
            self.outputs.clear()
            self._passing.close()
            self._node, self._caller = None, NOBODY

    def _enter_module(self, module: nn.Module, _args: Any) -> None:
        # A module from outside the model, a loss say, has no path: what it calls stays where it is.
        here = self._here() if self._threads else self
        modules = here._change_module()  # noqa: SLF001 - a recorder as this one
        outer = modules[-1] if modules else ""
        if self.on_root is not None and not modules:
            self.on_root(module)
        modules.append(self._names.get(id(module), outer))

    def _leave_module(self, module: nn.Module, _args: Any, output: Any) -> None:
        here = self._here() if self._threads else self
        modules = here._change_module()  # noqa: SLF001 - a recorder as this one
        if modules:
            modules.pop()
        name = self._names.get(id(module))
        if name == ROOT:
            named = named_tensors(output, "output")
            self.outputs.extend((path, unwrapped(tensor)) for path, tensor in named)
        if self._scope.modules and name is not None:
            self._passing.watch(name, (unwrapped(t) for _, t in named_tensors(output)))

    def _here(self) -> "Recorder":
        """What records the running thread: hooks are those of the whole process."""
        if not self._threads:
            return self
        branches = (mode for mode in acting_here() if isinstance(mode, _Branch))
        return next((branch for branch in branches if branch.trunk is self), self)

    def _enter_optimizer(self, *_: Any) -> None:
        here = self._here()
        here._outer_stage, here.stage = here.stage, "optimizer"  # noqa: SLF001 - as above

    def _leave_optimizer(self, *_: Any) -> None:
        here = self._here()
        here.stage = here._outer_stage  # noqa: SLF001 - as above

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        info = _known_info(id(func)) or op_info(func)
        node = _current_node()
        if node is not self._node:
            self._enter_node(node)
        try:
            caller: FrameType | None = _frame(1)
        except ValueError:  # nobody: a thread of the engine's own, such as every device has
            caller = None
        # Nearly every op of a backward is one that a node of C++ runs itself.
        is_engines = caller is None or caller.f_code is ENGINE_CODE
        if self._is_traced if is_engines else is_traced():
            return func(*args, **(kwargs or {}))
        poison, execute = self._poison, self._execute
        # Read before the op runs, which may overwrite what it reads.
        before = None
        if poison or self._is_busy or (info.is_update and not self._is_clear_at_first(args)):
            before = self._look_before(info, args, kwargs)
        if execute is not None:
            returned = execute(func, args, kwargs or {})
        else:
            returned = info.call(*args, **kwargs) if kwargs else info.call(*args)
        outputs: list[Tensor] | None = None
        if info.is_single and type(returned) is Tensor:
            dtype: torch.dtype | None = returned.dtype
        else:
            outputs = Call(info, args, kwargs or {}).outputs(returned)
            dtype = dtype_of(outputs)
        event = (
            self._note_engine_op(info, dtype)
            if is_engines
            else self._note_call(info, dtype, caller)
        )
        # Nearly every op ends here: nothing non-finite is known, and the screen clears the output.
        is_met = poison or self._is_busy or info.is_collective
        if not is_met and info.is_screened:
            is_met = not self._is_cleared(info.shortcut, args, returned, outputs)
        if is_met:
            found = [returned] if outputs is None else outputs
            self._follow(event, Call(info, args, kwargs or {}), node, before, found)
        else:
            self._append(event)
        return returned

    def _look_before(
        self, info: OpInfo, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
    ) -> Given | None:
        """What an op is given of the non-finite values that are known, or that it overwrites."""
        if self._scope.shapes:
            self._shapes = [(tensor.shape, tensor.dtype) for tensor in inputs_of(args, kwargs)]
        if not self._poison and (not info.is_update or self._is_clear_at_first(args)):
            return None
        with self._lock:
            return self._flow.measure_inputs(inputs_of(args, kwargs), info)

    def _is_kept_poison(self, poison: Poison) -> bool:
        """Whether the forward, or the state before the step, left something non-finite."""
        return all(s < 0 or self._raw[s][0] == "forward" for s in poison.sources)

    def _follow(
        self, event: Entry, call: Call, node: Any, given: Given | None, outputs: Any
    ) -> None:
        """Append an event whose place among the others matters, and what it met."""
        if self._scope.shapes:
            returned = [(tensor.shape, tensor.dtype) for tensor in outputs]
            event = (*event[:-2], (self._shapes, returned), None)
        with self._lock:
            self._raw.append(event)
            index = self.position - 1
            while self._raw[index] is not event:
                index -= 1  # another thread appends without asking
            if call.info.is_collective:
                self._flow.note_collective(outputs, index)
            if self.kept is not None:
                self.kept.add(call, outputs)
            if index in self._scope.repair:
                # An op that makes no node shows the number of the last one.
                made = made_by(event)
                is_new = made != made_by(self._raw[index - 1])
                number = number_of(event)
                self._repaired.add(number if node is not None else made if is_new else -1)
            if index in self._scope.repair or number_of(event) in self._repaired:
                # What a node had kept is none of what came to it: the loss was finite all the same.
                passed_on = given.without(self._is_kept_poison) if given and node else given
                repair(outputs, passed_on, is_backward=node is not None)
            met = self._flow.follow(call, node, given, outputs, index)
            if met is not None:
                self._raw[index] = (*event[:-1], met)
        if met is not None and met.birth is not None and self.on_birth is not None:
            self.on_birth(index)


class _Branch(Recorder):
    """What a recorder is in another thread: it shares all but what is under way there.

    Its ops take their turns with those of `trunk`; its modules begin where it was started, and so
    does the line of an op that no line of the thread's own called.
    """

    def __init__(self, trunk: Recorder, starter: Recorder) -> None:
        super(Recorder, self).__init__()  # type: ignore[no-untyped-call]
        self.trunk = trunk
        with trunk._lock:  # noqa: SLF001 - a recorder as this one
            trunk._threads += 1  # noqa: SLF001 - as above
            started_at = user_call()[0] or starter._started_at  # noqa: SLF001 - as above
            self._begin(trunk._threads, starter._modules[-1:], started_at)  # noqa: SLF001 - as above
        self._tags = Tags(self.thread)

    def __getattr__(self, name: str) -> Any:
        # Only for what this one does not have itself.
        return getattr(self.trunk, name)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self._tags.write()
        self._about = None  # the stage and the step are the trunk's
        number = sequence_number() - 1
        returned = super().__torch_dispatch__(func, types, args, kwargs)
        is_written = bool(args) and returned is args[0]
        self._tags.note(tensors_in((returned,)), number, is_written=is_written)
        return returned

    def for_thread(self) -> Recorder:
        return _Branch(self.trunk, self)

    def finish(self) -> None:
        self._tags.write()
        self._node, self._caller = None, NOBODY
