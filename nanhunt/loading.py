"""Finding a subject by the name that the command line was given."""

import ast
import importlib
import importlib.util
import inspect
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import torch

from nanhunt.errors import NanhuntError, SubjectError, UsageError
from nanhunt.generators import seed_generators
from nanhunt.subject import Subject, moved, told

GROUP = "nanhunt.subjects"
BUNDLED = "ris:incident"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A subject, the name under which it was found, and what should be said about the choice."""

    subject: Subject
    spec: str
    remark: str = ""


def load(
    spec: str | None,
    *,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Loaded:
    """Build the subject that a name stands for.

    Args:
        spec: an entry point name (`ris:incident`), `path/to/file.py:factory` or
            `package.module:factory`; None takes `[tool.nanhunt] subject` of the nearest
            `pyproject.toml`, else the bundled one.
        options: keyword arguments of the factory.
        seed: under which the factory is called; it is also its option `seed`, if it has one.
        device: where the model and its batches are put.

    Raises:
        SubjectError: nothing has that name, or the factory failed or returned something else.
        UsageError: the factory takes no such option, or there is no such device.
    """
    _check_device(device)
    if not -(2**63) <= seed < 2**64:
        raise UsageError(f"--seed takes a whole number from -2**63 to 2**64 - 1; got {seed}")
    remark = ""
    if spec is None:
        spec, remark = _default()
    factory = find(spec)
    given = dict(options or {})
    takes_seed = "seed" in (_option_names(factory) or ())
    if takes_seed:
        given.setdefault("seed", seed)
    built = Subject.of(_call(factory, spec, given, seed))
    if not takes_seed:
        built = replace(built, seed=seed)
    return Loaded(moved(built, device), spec, remark)


def installed() -> tuple[EntryPoint, ...]:
    """The subjects that installed packages offer, by name."""
    return tuple(sorted(entry_points(group=GROUP), key=lambda entry: entry.name))


def find(spec: str) -> Callable[..., Any]:
    """Resolve a name to the factory behind it.

    Raises:
        SubjectError: nothing has that name; the sentence lists what has.
    """
    named = next((entry for entry in installed() if entry.name == spec), None)
    if named is not None:
        entry: Callable[..., Any] = _imported(named.load, spec)
        return entry
    place, separator, attribute = spec.rpartition(":")
    if not separator or not place or not attribute:
        names = ", ".join(entry.name for entry in installed()) or "none"
        raise SubjectError(
            f"no subject is called {spec!r}; installed subjects: {names}; "
            f"or give path/to/file.py:factory or package.module:factory"
        )
    module = _imported(lambda: _module(place), spec)
    factory = getattr(module, attribute, None)
    if factory is None:
        offered = [n for n, v in vars(module).items() if inspect.isfunction(v) and n[0] != "_"]
        raise SubjectError(
            f"{place} has no {attribute!r}; its functions: {', '.join(offered) or 'none'}"
        )
    if not callable(factory):
        raise SubjectError(
            f"{spec} is not a factory but an object of type {type(factory).__name__}; "
            f"name a function that returns the subject"
        )
    found: Callable[..., Any] = factory
    return found


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"--device takes cpu or cuda; got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: torch sees no CUDA device here; use cpu")


def _default() -> tuple[str, str]:
    for folder in (Path.cwd(), *Path.cwd().parents):
        file = folder / "pyproject.toml"
        if file.is_file():
            named = _subject_in(file)
            if named is not None:
                return named, f"subject {named} from {file.name}"
            break
    return BUNDLED, f"no subject given: using the bundled incident ({BUNDLED})"


def _subject_in(file: Path) -> str | None:
    try:
        table: Any = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SubjectError(f"{file} cannot be read: {error}") from error
    for key in ("tool", "nanhunt"):
        table = table.get(key, {})
        if not isinstance(table, dict):
            raise SubjectError(f"{key} in {file} is to be a table; got {table!r}")
    named = table.get("subject")
    if named is not None and not isinstance(named, str):
        raise SubjectError(f"[tool.nanhunt] subject of {file} is to be a string; got {named!r}")
    return named


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(place)
    file = Path(place)
    if not file.is_file():
        raise SubjectError(f"there is no file {place}; give path/to/file.py:factory")
    # A file may import its neighbours, as it could when Python ran it.
    if str(file.resolve().parent) not in sys.path:
        sys.path.insert(0, str(file.resolve().parent))
    name = f"nanhunt_subject_{file.stem}"
    found = importlib.util.spec_from_file_location(name, file.resolve())
    if found is None or found.loader is None:
        raise SubjectError(f"{place} cannot be imported as Python")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    found.loader.exec_module(module)
    return module


def _imported(action: Callable[[], Any], spec: str) -> Any:
    try:
        return action()
    except NanhuntError:
        raise
    except ModuleNotFoundError as error:
        raise SubjectError(f"the subject {spec} cannot be imported: {error}") from error
    except (Exception, SystemExit) as error:
        raise SubjectError(f"importing the subject {spec} raised {told(error)}") from error


def _call(factory: Callable[..., Any], spec: str, options: Mapping[str, Any], seed: int) -> Any:
    _check_options(factory, spec, options)
    seed_generators(seed)
    try:
        with torch.enable_grad():
            return factory(**options)
    except NanhuntError:
        raise
    except (Exception, SystemExit) as error:
        raise SubjectError(f"the factory {spec} raised {told(error)}") from error


def _check_options(factory: Callable[..., Any], spec: str, options: Mapping[str, Any]) -> None:
    known = _option_names(factory)
    for name in () if known is None else options:
        if name not in (known or ()):
            raise UsageError(
                f"the subject {spec} has no option {name!r}; "
                f"it takes {', '.join(known or ()) or 'none'}"
            )


def _option_names(factory: Callable[..., Any]) -> list[str] | None:
    """The options that a factory takes by name; None where it takes any, or does not tell."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]


def read_option(text: str) -> tuple[str, Any]:
    """Read `key=value` of `--set`: Python literals are taken as such, anything else as text.

    Raises:
        UsageError: there is no `=` or no key.
    """
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise UsageError(f"--set takes key=value, as in --set preset=tiny; got {text!r}")
    try:
        return key.strip(), ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return key.strip(), value
