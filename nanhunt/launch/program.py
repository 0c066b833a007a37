"""The program: a script, a module, a folder or an archive, run as Python itself would run it."""

import builtins
import importlib.util
import io
import os
import pkgutil
import runpy
import sys
import types
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader, SourcelessFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from nanhunt.errors import UsageError

# Whose functions still run when another module stands as `__main__`.
_REPLACED: list[ModuleType] = []


@dataclass(frozen=True, slots=True)
class Program:
    """What is run: the path of a script, or the name of a module, and its own arguments."""

    target: str
    arguments: tuple[str, ...] = ()
    is_module: bool = False

    @property
    def name(self) -> str:
        """A word for it, fit for the name of a file."""
        word = self.target.rpartition(".")[2] if self.is_module else Path(self.target).stem
        return "".join(c if c.isalnum() or c in "-_" else "-" for c in word) or "program"

    def check(self) -> None:
        """Refuse what cannot be started, before anything is done."""
        if self.is_module:
            first = self.target.partition(".")[0]
            if not first or _is_missing(first):
                raise UsageError(
                    f"-m {self.target}: there is no module {first!r} on Python's path; install it, "
                    f"or run from the folder that holds it"
                )
            return
        path = Path(self.target)
        if not path.exists():
            raise UsageError(
                f"there is no script {self.target}; give a file, or -m and the name of a module "
                f"(options of nanhunt stand before it, those of the script behind it)"
            )
        if path.is_dir() and not (path / "__main__.py").is_file():
            raise UsageError(
                f"{self.target} is a folder without __main__.py; name the script in it"
            )

    def run(self) -> None:
        """Run it in a `__main__` of its own; what it raises comes through."""
        main = ModuleType("__main__")
        vars(main)["__builtins__"] = builtins
        if "__annotations__" in vars(sys.modules["__main__"]):  # not so in every Python
            vars(main)["__annotations__"] = {}
        _REPLACED.append(sys.modules["__main__"])
        sys.modules["__main__"] = main
        if self.is_module:
            sys.argv = ["-m", *self.arguments]  # until it is found, as Python has it
            _set_first_path(str(Path.cwd()))
            runpy._run_module_as_main(self.target)  # type: ignore[attr-defined]  # noqa: SLF001
            return
        sys.argv = [self.target, *self.arguments]
        path = os.path.join(Path.cwd(), self.target)  # noqa: PTH118 - not normalised, as Python's
        if _is_importable(path):
            _set_first_path(path, even_if_safe=True)
            runpy._run_module_as_main("__main__", False)  # type: ignore[attr-defined]  # noqa: SLF001
            return
        _set_first_path(str(Path(path).resolve().parent))
        _run_script(path, main)


def _run_script(path: str, main: ModuleType) -> None:
    """Execute a file of source or bytecode in a module."""
    names = vars(main)
    names["__file__"], names["__cached__"] = path, None
    names["__loader__"] = SourceFileLoader("__main__", path)
    code = _read_bytecode(path)
    if code is None:
        with io.open_code(path) as file:
            source = file.read()
        code = compile(source, path, "exec", dont_inherit=True)
    else:
        names["__loader__"] = SourcelessFileLoader("__main__", path)
    exec(code, names)  # noqa: S102 - it is what the user asked for


def _read_bytecode(path: str) -> CodeType | None:
    with io.open_code(path) as file:
        code: CodeType | None = pkgutil.read_code(file)
    return code


def _set_first_path(entry: str, *, even_if_safe: bool = False) -> None:
    """Put the program's own folder where Python had put ours."""
    if not sys.flags.safe_path:
        sys.path[:1] = [entry]
    elif even_if_safe:
        sys.path.insert(0, entry)


def _is_importable(path: str) -> bool:
    """Whether Python runs the `__main__` inside: of a folder, or of a zip archive."""
    return Path(path).is_dir() or type(pkgutil.get_importer(path)).__name__ == "zipimporter"


def _is_missing(module: str) -> bool:
    """Whether no module has the name; one from the current folder counts."""
    before = sys.path[:]
    _set_first_path(str(Path.cwd()))
    try:
        return importlib.util.find_spec(module) is None
    except (ImportError, ValueError):
        return True
    finally:
        sys.path[:] = before


def end_at_the_program(error: BaseException) -> None:
    """Have Python tell an error with the program's own frames alone.

    It is told when it has left us, so the frames are taken out at that moment: those that led to
    the program, and ours inside of it.
    """
    told = sys.excepthook

    def tell(
        kind: type[BaseException], value: BaseException, trace: types.TracebackType | None
    ) -> None:
        if value is error:
            trace = _without_own_frames(trace)
            value.__traceback__ = trace
        told(kind, value, trace)

    sys.excepthook = tell


_OWN = str(Path(__file__).parents[1]) + os.sep


def _without_own_frames(trace: types.TracebackType | None) -> types.TracebackType | None:
    steps: list[types.TracebackType] = []
    while trace is not None:
        steps.append(trace)
        trace = trace.tb_next
    files = [step.tb_frame.f_code.co_filename for step in steps]
    started = max((i for i, file in enumerate(files) if file == __file__), default=-1)
    left = [
        step
        for i, (step, file) in enumerate(zip(steps, files, strict=True))
        if i > started and not file.startswith(_OWN)
    ]
    kept: types.TracebackType | None = None
    for step in reversed(left):
        kept = types.TracebackType(kept, step.tb_frame, step.tb_lasti, step.tb_lineno)
    return kept
