"""A folder of cases: what a tool may see of one, what it may answer, and a clean process for it.

A case is a Python file with a `CASE` that says what is true of it and a `build()` that makes the
program. `Program` is everything but the truth, so that a tool which is given one cannot peek.
"""

import importlib.util
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

Made = TypeVar("Made")
Kind: TypeAlias = Literal["", "inf", "nan"]
Points: TypeAlias = Iterator[tuple[str, Tensor]]
is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor  # noqa: SLF001 - only there
TrainStep: TypeAlias = Callable[[nn.Module, Any, Callable[..., Tensor], Any, Any, int], Points]


@dataclass(frozen=True, slots=True)
class Named:
    """One culprit as a tool names it; what it cannot say is None. `line` is one of the case."""

    phase: str
    op: str | None = None
    node: str | None = None
    line: int | None = None
    cause: str | None = None
    where: str | None = None
    occurrence: int | None = None
    module: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a tool said of one case: the culprits, the first of which is its main one."""

    named: tuple[Named, ...] = ()
    seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Program:
    """The program of a case without what is known about it: no truth, no fix, no marks."""

    path: Path
    steps: int
    build: Callable[[], tuple[nn.Module, Any, Callable[..., Tensor]]]
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None
    make_scaler: Callable[[], Any] | None
    batch_at: Callable[[int], Any] | None
    train_step: TrainStep | None

    @classmethod
    def of(cls, path: Path) -> "Program":
        """The program in a file; of its `CASE`, only the number of steps is read."""
        module = loaded(path)
        build = getattr(module, "build", None)
        if build is None:
            raise ValueError(f"{path.name} has no build()")
        steps = int(getattr(module, "CASE", {}).get("steps", 1))
        optional = ("make_optimizer", "make_scaler", "batch_at", "train_step")
        return cls(path, steps, build, *(getattr(module, name, None) for name in optional))


def loaded(path: Path) -> ModuleType:
    """The module of a case, anew; its lines and the files beside it can be found."""
    # The prefix keeps a case called `signal.py` from taking the place of the real one.
    name = f"case_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path.name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.append(str(path.parent))
    spec.loader.exec_module(module)
    return module


def truth_of(path: Path) -> dict[str, Any]:
    """The `CASE` of a file: what is true of it, for the judge alone."""
    case = getattr(loaded(path), "CASE", None)
    if not isinstance(case, Mapping):
        raise TypeError(f"{path.name} has no CASE")
    lacking = [key for key in ("id", "phase", "op") if key not in case]
    if lacking:
        raise ValueError(f"the CASE of {path.name} lacks {', '.join(lacking)}")
    return dict(case)


def cases_in(folder: Path, only: tuple[str, ...] = ()) -> list[Path]:
    """The files of a folder that are cases, by name; those called `_*.py` only support them."""
    files = sorted(file for file in folder.glob("*.py") if not file.name.startswith("_"))
    missing = set(only) - {file.stem for file in files}
    if missing:
        raise ValueError(f"no case called {', '.join(sorted(missing))} in {folder.name}")
    return [file.resolve() for file in files if not only or file.stem in only]


class Training:
    """A program that is being trained, for tools that watch it rather than repeat it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.model, self._batch, self.loss_fn = program.build()
        self.optimizer = program.make_optimizer(self.model) if program.make_optimizer else None
        self.scaler = program.make_scaler() if program.make_scaler else None

    def batch(self, step: int) -> Any:
        """The batch of a step."""
        return self.program.batch_at(step) if self.program.batch_at else self._batch

    def points(self, batch: Any, step: int) -> Points:
        """Take one step, stopping after the loss, the backward and the update."""
        take = self.program.train_step or plain_step
        return take(self.model, batch, self.loss_fn, self.optimizer, self.scaler, step)

    def failed(self, point: str, loss: Tensor) -> str | None:
        """The phase that has failed if the training is non-finite at this point."""
        if point == "loss":
            return None if finite(loss) else "forward"
        parameters = list(self.model.parameters())
        if point == "grads":
            # A scaled overflow is what a scaler is there to skip; the parameters tell later.
            if self.scaler is not None and self.scaler.get_scale() > 1:
                return None
            gradients = [p.grad for p in parameters if p.grad is not None]
            return None if all(map(finite, gradients)) else "backward"
        return None if all(map(finite, parameters)) else "optimizer"


def plain_step(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[..., Tensor],
    opt: torch.optim.Optimizer | None,
    scaler: Any,
    step: int,
) -> Points:
    """The step of a case that brings none."""
    del step
    model.zero_grad()
    loss = loss_fn(model, *batch)
    yield "loss", loss
    (loss if scaler is None else scaler.scale(loss)).backward()
    yield "grads", loss
    if opt is None:
        return
    if scaler is None:
        opt.step()
    else:
        scaler.step(opt)
        scaler.update()
    yield "step", loss


def finite(value: Tensor) -> bool:
    """Whether every element is finite."""
    value = value.detach()
    value = value.coalesce().values() if value.is_sparse else value
    return bool(value.isfinite().all())


def kind_of(value: Tensor) -> Kind:
    """Whether a tensor holds a NaN, else an infinity."""
    # Torch's lazy zeros have no memory, and one under vmap or grad cannot be asked for its values.
    if value.is_meta or value._is_zerotensor() or is_wrapped(value):  # noqa: SLF001 - as above
        return ""
    if value.is_quantized or not (value.is_floating_point() or value.is_complex()):
        return ""
    value = value.detach()
    value = value.coalesce().values() if value.is_sparse else value
    if value.layout is not torch.strided or finite(value):
        return ""
    return "nan" if bool(value.isnan().any()) else "inf"


def isolated(
    work: Callable[..., Made], *args: object, limit: float = 120.0, threads: int = 1
) -> tuple[Made | None, str | None]:
    """What `work` makes in a process of its own, or one sentence on why it made nothing.

    The process is forked where that is possible: torch is imported once, and as long as the parent
    runs no operation each child starts from the same clean state.
    """
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if can_fork else "spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(  # type: ignore[attr-defined]  # typeshed: BaseContext has none
        target=_work, args=(send, threads, work, args), daemon=True
    )
    process.start()
    send.close()
    try:
        if not receive.poll(limit):
            return None, f"took longer than {limit:g} s"
        made: tuple[Made | None, str | None] = receive.recv()
    except EOFError:
        process.join()
        return None, f"its process died with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return made


def _work(
    send: Connection, threads: int, work: Callable[..., object], args: tuple[object, ...]
) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    # What a case or a library prints is no part of the table; loggers hold on to the real streams.
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silent, stream)
    made: object = None
    error = None
    try:
        made = work(*args)
    except BaseException as raised:  # noqa: BLE001 - a case may raise anything, SystemExit too
        message = " ".join(str(raised).split())[:300]
        error = f"{type(raised).__name__}{': ' if message else ''}{message}"
    send.send((made, error))
