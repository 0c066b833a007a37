"""What else could be asked: the ways of finding a NaN that nanhunt is compared with.

Each is a function from a program to the culprits that it names, written to do as well as the idea
allows. They train as the case trains, and stop where that becomes non-finite.
"""

# ruff: noqa: SLF001 - torch offers the running node, its number and an op's schema privately only

import copy
import dataclasses
import importlib
import importlib.util
import json
import math
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import torch
from protocol import Kind, Named, Program, Training, kind_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Rival: TypeAlias = Callable[[Program], tuple[Named, ...]]

sequence_number: Callable[[], int] = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]


class NotInstalledError(Exception):
    """The tool is not here."""


class Watch:
    """Looks on while a step is taken; the base sees nothing."""

    def begin(self, training: Training, batch: Any) -> None:
        """A step begins."""

    def reached(self, point: str) -> None:
        """The training has come to the loss, the gradients or the end of the step."""

    def looking(self) -> AbstractContextManager[object]:
        """The context in which a part of the step is taken."""
        return nullcontext()


def train(program: Program, watch: Watch) -> str | None:
    """Train under a watch until something is non-finite; returns the phase that failed."""
    training = Training(program)
    for step in range(program.steps):
        batch = training.batch(step)
        watch.begin(training, batch)
        points = training.points(batch, step)
        while True:
            # A compiled step would hide its ops, and compile the watch along.
            with torch.compiler.set_stance("force_eager"), watch.looking():
                reached = next(points, None)
            if reached is None:
                break
            if failed := training.failed(*reached):
                return failed
            watch.reached(reached[0])
    return None


def frames_of(frame: FrameType | None, program: Program) -> Iterator[tuple[int, str]]:
    """The lines of a case that are being executed, and their functions; the innermost first."""
    file = str(program.path)
    while frame is not None:
        if frame.f_code.co_filename == file:
            yield frame.f_lineno, frame.f_code.co_qualname
        frame = frame.f_back


def in_backward() -> bool:
    """Whether the engine is running."""
    return torch._C._current_graph_task_id() != -1


def tensors_in(*values: Any) -> list[Tensor]:
    """Every tensor of a structure."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Dispatch(TorchDispatchMode):
    """Hands every op to a function that calls it."""

    def __init__(self, call: Callable[[Any, Any, Mapping[str, Any]], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.call = call

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the op."""
        del types
        return self.call(func, args, kwargs or {})


class Ops(Watch):
    """Every op of a step, and what it made: the mode that anyone would write first.

    `births` are the ops whose inputs are finite and whose output is not, or that make a NaN of an
    infinity; writing down a literal infinity is none. `nonfinite` are all with such an output. An
    op that takes a non-finite value from the batch, a parameter or a buffer stands for that.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.stage = "forward"
        self.births: list[tuple[str, Named]] = []
        self.nonfinite: list[tuple[str, Named]] = []
        self.ever: list[Named] = []
        self.data: dict[int, Named] = {}
        self.origins: dict[tuple[int, int], tuple[str, list[tuple[int, str]]]] = {}

    def looking(self) -> AbstractContextManager[object]:
        """Under the mode."""
        return Dispatch(self._call)

    def begin(self, training: Training, batch: Any) -> None:
        """Forget the last step, and note which values are non-finite before this one."""
        self.stage = "forward"
        self.births, self.nonfinite = [], []
        self.origins, self.data = {}, {}
        parts = batch.items() if isinstance(batch, dict) else enumerate(batch)
        held = [("input", f"batch[{key}]", t) for key, part in parts for t in tensors_in(part)]
        model = training.model
        held += [("parameter", f"param:{name}", p) for name, p in model.named_parameters()]
        held += [("buffer", f"buffer:{name}", b) for name, b in model.named_buffers()]
        for op, where, value in held:
            if not value.is_sparse and kind_of(value):
                key = value.untyped_storage().data_ptr()
                self.data[key] = Named("data", op, where=where)

    def reached(self, point: str) -> None:
        """After the gradients comes the update."""
        self.stage = "optimizer" if point == "grads" else self.stage

    def _call(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        # Before the call: it may write to its inputs.
        inputs = tensors_in(args, kwargs)
        kinds = [kind_of(value) for value in inputs]
        held = [self._held(v) for v, kind in zip(inputs, kinds, strict=True) if kind]
        data = next((named for named in held if named is not None), None)
        out = func(*args, **kwargs)
        named = data or self._name(func)
        made = self._made(func, args, kwargs, out)
        # What an allocation holds is nobody's value yet.
        if made and not func._schema.name.startswith(("aten::empty", "aten::new_empty")):
            stage = "backward" if in_backward() else self.stage
            self.nonfinite.append((stage, named))
            self.ever.append(named)
            leaves = tree_leaves((args, kwargs))
            literal = any(isinstance(leaf, float) and not math.isfinite(leaf) for leaf in leaves)
            from_finite = not any(kinds) and not literal
            if data or from_finite or (made == "nan" and "nan" not in kinds):
                self.births.append((stage, named))
        return out

    def _held(self, value: Tensor) -> Named | None:
        return None if value.is_sparse else self.data.get(value.untyped_storage().data_ptr())

    @staticmethod
    def _made(func: Any, args: Any, kwargs: Mapping[str, Any], out: Any) -> Kind:
        """What is non-finite of what an op returned or wrote to."""
        arguments = func._schema.arguments
        given = {a.name: value for a, value in zip(arguments, args, strict=False)} | dict(kwargs)
        written = [
            given.get(a.name)
            for a in arguments
            if a.alias_info is not None and a.alias_info.is_write
        ]
        kinds = {kind_of(value) for value in tensors_in(out, written)}
        return "nan" if "nan" in kinds else "inf" if "inf" in kinds else ""

    def _name(self, func: Any) -> Named:
        """The op; in the backward the forward op whose node is running, by its number."""
        op: str = func._schema.name
        thread = threading.get_ident()
        if not in_backward():
            lines = list(frames_of(sys._getframe(2), self.program))
            # The earliest op with a number is its node's.
            self.origins.setdefault((thread, sequence_number() - 1), (op, lines))
            return Named(self.stage, op, line=lines[0][0] if lines else None)
        node = torch._C._current_autograd_node()
        if node is None:
            return Named("backward", op)
        origin, lines = self.origins.get((thread, node._sequence_nr()), (op, []))
        # The ops of a user's Function run inside it; what is asked for is the line that calls it.
        inside = node.name().removesuffix("Backward") + "."
        line = next((line for line, function in lines if not function.startswith(inside)), None)
        return Named("backward", origin, node.name(), line)


def births(program: Program) -> tuple[Named, ...]:
    """The first birth of the phase that failed; asked only after a failure."""
    watch = Ops(program)
    failed = train(program, watch)
    return tuple(named for stage, named in watch.births if stage == failed)[:1]


def first_op_after_failure(program: Program) -> tuple[Named, ...]:
    """The first op with a non-finite output in the phase that failed; asked after a failure."""
    watch = Ops(program)
    failed = train(program, watch)
    return tuple(named for stage, named in watch.nonfinite if stage == failed)[:1]


def first_op(program: Program) -> tuple[Named, ...]:
    """The first op with a non-finite output, of the step that failed if one did; always asked."""
    watch = Ops(program)
    failed = train(program, watch)
    return tuple(named for _, named in watch.nonfinite)[:1] if failed else tuple(watch.ever[:1])


def detect_anomaly(program: Program) -> tuple[Named, ...]:
    """Torch's own: the node in its error and the innermost line of the case in its warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with torch.autograd.detect_anomaly(check_nan=True):
                train(program, Watch())
        except RuntimeError as error:
            said = re.search(r"Function '(\w+)' returned nan values", str(error))
            if said is None:
                raise
        else:
            return ()
    told = "\n".join(str(warning.message) for warning in caught)
    lines = re.findall(rf'File "{re.escape(str(program.path))}", line (\d+)', told)
    return (Named("backward", node=said[1], line=int(lines[-1]) if lines else None),)


class Modules(Watch):
    """Hooks on every module that look at its output and at the gradients that leave it."""

    def __init__(self, program: Program, *, backward: bool) -> None:
        self.program, self.backward, self.is_hooked = program, backward, False
        self.named: list[Named] = []
        self.lines: dict[str, int | None] = {}

    def begin(self, training: Training, batch: Any) -> None:
        """Hook the modules, once."""
        del batch
        if self.is_hooked:
            return
        self.is_hooked = True
        for name, module in training.model.named_modules():
            module.register_forward_hook(self._forward(name))
            if self.backward:
                module.register_full_backward_hook(self._backward(name))

    def _forward(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(_module: nn.Module, _args: Any, output: Any) -> None:
            frames = frames_of(sys._getframe(1), self.program)
            self.lines[name] = next((line for line, _ in frames), None)
            if any(map(kind_of, tensors_in(output))):
                self.named.append(Named("forward", line=self.lines[name], module=name))

        return look

    def _backward(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, outputs: Any) -> None:
            leaving = [*tensors_in(inputs), *tensors_in([p.grad for p in module.parameters()])]
            if any(map(kind_of, leaving)) and not any(map(kind_of, tensors_in(outputs))):
                self.named.append(Named("backward", line=self.lines.get(name), module=name))

        return look


def forward_hooks(program: Program) -> tuple[Named, ...]:
    """The first module with a non-finite output, the innermost of those nested; always asked."""
    watch = Modules(program, backward=False)
    train(program, watch)
    return tuple(watch.named[:1])


def module_hooks(program: Program) -> tuple[Named, ...]:
    """The first module with a non-finite output or gradient in the phase that failed."""
    watch = Modules(program, backward=True)
    failed = train(program, watch)
    return tuple(named for named in watch.named if named.phase == failed)[:1]


class Before(Watch):
    """Keeps model and batch as they were before the step, for tools that run it themselves."""

    def begin(self, training: Training, batch: Any) -> None:
        """Copy what the step may change."""
        self.loss_fn = training.loss_fn
        self.model, self.batch = copy.deepcopy((training.model, batch))
        self.random = torch.get_rng_state()


class Whole(nn.Module):
    """A model and its loss as one module."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, *batch: Any) -> Tensor:
        """The loss."""
        return self.loss_fn(self.model, *batch)


def torchlens(program: Program) -> tuple[Named, ...]:
    """The package torchlens 2, in a main process of its own: it refuses to work in a forked one."""
    if importlib.util.find_spec("torchlens") is None:
        raise NotInstalledError("torchlens is not installed")
    words = [sys.executable, __file__, str(program.path)]
    ran = subprocess.run(words, capture_output=True, text=True, check=False, timeout=100)  # noqa: S603 - ourselves
    if ran.returncode:
        raise RuntimeError(ran.stderr.strip().rpartition("\n")[2])
    return tuple(Named(**named) for named in json.loads(ran.stdout.rpartition("\n")[2]))


def torchlens_here(program: Program) -> tuple[Named, ...]:
    """`find_nan` or `bisect_nan_backward`, on the step and the phase that failed."""
    before = Before()
    failed = train(program, before)
    if failed not in ("forward", "backward"):
        return ()
    # By name, since it is no dependency.
    lens, debug = importlib.import_module("torchlens"), importlib.import_module("torchlens.debug")
    torch.set_rng_state(before.random)
    whole, batch = Whole(before.model, before.loss_fn), list(before.batch)
    if failed == "forward":
        found = debug.find_nan(whole, batch)
        line = _case_line(found.op, found.source_line, program)
        return (Named("forward", _aten(found), line=line),) if found.found else ()
    options = importlib.import_module("torchlens.options")
    capture = options.CaptureOptions(backward_ready=True, save_grads=True)
    trace = lens.trace(whole, batch, capture=capture)
    trace.log_backward(trace[trace.output_layers[0]].out)
    birth = debug.bisect_nan_backward(trace).birth
    if birth is None:
        return ()
    op = trace[birth.op_label] if birth.op_label else None
    line = _case_line(op, birth.source_line, program)
    return (Named("backward", op and op.func_name, birth.grad_fn_class, line),)


def _aten(found: Any) -> str:
    """The op of a finding: it tells the function of Python, its node tells the op."""
    node = re.match(r"(\w+)Backward\d", getattr(found.op, "grad_fn_class_name", None) or "")
    if node is not None:
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", node[1]).lower()
    return str(found.func_name).strip("_").replace("truediv", "div")


def _case_line(op: Any, said: str | None, program: Program) -> int | None:
    """The innermost line of the case in an op's context, else the outermost, which is printed."""
    for frame in reversed(getattr(op, "code_context", None) or ()):
        if frame.file == str(program.path):
            return int(frame.line_number)
    file, _, line = (said or "").rpartition(":")
    return int(line) if file == str(program.path) else None


RIVALS: Mapping[str, Rival] = {
    "detect_anomaly": detect_anomaly,
    "first op": first_op,
    "first op after failure": first_op_after_failure,
    "births after failure": births,
    "forward hooks": forward_hooks,
    "module hooks": module_hooks,
    "torchlens": torchlens,
}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    culprits = torchlens_here(Program.of(Path(sys.argv[1])))
    print(json.dumps([dataclasses.asdict(named) for named in culprits]), end="")
