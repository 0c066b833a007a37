"""The layout of the code: which room may import which, and what every file keeps to."""

import ast
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import EntryPoint, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import nanhunt

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# Every room of nanhunt; each imports only from lower levels.
LEVELS = {
    "errors": 0,
    "records": 1,
    "places": 2,
    "measurement": 2,
    "structure": 2,
    "generators": 2,
    "versions": 2,
    "interventions": 2,
    "processes": 2,
    "causes": 2,
    "gate": 2,
    "store": 2,
    "health": 2,
    "objective": 2,
    "report": 3,
    "recorder": 3,
    "subject": 3,
    "analysis": 3,
    "capsule": 4,
    "snapshot": 4,
    "variants": 4,
    "loading": 5,
    "replay": 5,
    "trials": 6,
    "repro": 6,
    "guarding": 6,
    "hunting": 7,
    "gating": 8,
    "watching": 8,
    "launch": 8,
    "commands": 9,
    "testing": 9,
    "adapters": 9,
    "cli": 10,
    "__init__": 11,
    "__main__": 11,
}
# The rooms that may import torch; the others only know records.
TORCH = {
    "measurement",
    "structure",
    "generators",
    "versions",
    "recorder",
    "interventions",
    "processes",
    "subject",
    "capsule",
    "snapshot",
    "loading",
    "variants",
    "replay",
    "trials",
    "repro",
    "hunting",
    "gating",
    "guarding",
    "watching",
    "launch",
}
# The one module that draws.
DRAWING = "nanhunt.report.html.drawing"
# The modules that make a pandas frame.
FRAMES = ("nanhunt.report.events", "nanhunt.report.health.tabular")
# The adapters to frameworks that import torch themselves.
FRAMEWORKS = tuple(f"nanhunt.adapters.{n}" for n in ("accelerate", "lightning", "transformers"))
# Every module of ris_model; each imports only from those before it.
ORDER = (
    "config",
    "storage",
    "geometry",
    "cells",
    "channel",
    "linalg",
    "covariance",
    "data",
    "shards",
    "images",
    "network",
    "losses",
    "metrics",
    "estimate",
    "checkpoint",
    "training",
    "subject",
    "tuning",
    "evaluation",
    "commands",
    "__main__",
    "__init__",
)
README_COMMANDS = (
    "pip install -c constraints.txt . && nanhunt replay --batch 0 --ablate lam_gap",
    "pip install -c constraints.txt '.[test]' && pytest",
)


@cache
def modules(package):
    """Dotted name of every module of a package, and its file; `__init__` stays in the name."""
    files = sorted((ROOT / package).rglob("*.py"))
    return {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in files}


def tree(file):
    """The syntax tree of a file."""
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def imports(name):
    """The dotted names that a module imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(tree(modules(name.partition(".")[0])[name])):
        if isinstance(node, ast.Import):
            found |= {target(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: -node.level] if node.level else []
            place = ".".join([*base, *filter(None, [node.module])])
            found |= {target(f"{place}.{alias.name}") for alias in node.names}
    return found


def target(dotted):
    """The module of this project that an import names, or the import as it stands."""
    known = modules(dotted.partition(".")[0]) if dotted.partition(".")[0] in OURS else {}
    for one in (dotted, dotted.rpartition(".")[0]):
        if f"{one}.__init__" in known:
            return f"{one}.__init__"
        if one in known:
            return one
    return dotted


OURS = ("nanhunt", "ris_model")
EVERY = [name for package in OURS for name in modules(package)]


def room(name):
    """The module or package directly under its package."""
    return name.split(".")[1]


@pytest.mark.parametrize("name", EVERY)
def test_every_module_has_a_level(name):
    """A new room is entered in the map."""
    assert room(name) in (LEVELS if name.startswith("nanhunt.") else ORDER)


def test_every_level_has_a_module():
    """A room that is gone leaves the map."""
    assert set(LEVELS) == {room(name) for name in modules("nanhunt")}
    assert set(ORDER) == {room(name) for name in modules("ris_model")}
    assert set(LEVELS) > TORCH


@pytest.mark.parametrize("name", modules("nanhunt"))
def test_imports_go_down(name):
    """No room of nanhunt imports from its own level or from above."""
    used = {room(i) for i in imports(name) if i.startswith("nanhunt.")} - {room(name)}
    assert [u for u in used if LEVELS[u] >= LEVELS[room(name)]] == []


@pytest.mark.parametrize("name", modules("ris_model"))
def test_imports_go_left(name):
    """No module of ris_model imports one that comes after it."""
    used = {room(i) for i in imports(name) if i.startswith("ris_model.")} - {room(name)}
    assert [u for u in used if ORDER.index(u) >= ORDER.index(room(name))] == []


@pytest.mark.parametrize("package", OURS)
def test_no_import_cycles(package):
    """No modules import each other, inside a room either."""
    graph = {name: {i for i in imports(name) if i in EVERY} for name in modules(package)}
    assert len(tuple(TopologicalSorter(graph).static_order())) >= len(graph)


@pytest.mark.parametrize("name", modules("nanhunt"))
def test_torch_in_named_rooms_only(name):
    """What only knows records imports neither torch nor numpy; pandas makes the frames."""
    heavy = {i.partition(".")[0] for i in imports(name)} & {
        "torch", "numpy", "pandas", "matplotlib",
    }  # fmt: skip
    allowed = {*((frames, "pandas") for frames in FRAMES), (DRAWING, "matplotlib")}
    allowed |= {(framework, "torch") for framework in FRAMEWORKS}
    assert room(name) in TORCH or {(name, each) for each in heavy} <= allowed


@pytest.mark.parametrize("name", EVERY)
def test_doctor_and_patient_are_strangers(name):
    """The tool never imports the model, nor the other way round."""
    other = {"nanhunt": "ris_model", "ris_model": "nanhunt"}[name.partition(".")[0]]
    assert [i for i in imports(name) if i.partition(".")[0] == other] == []


def test_torch_stays_unloaded():
    """A fresh Python imports the command line and everything about records without torch."""
    plain = (
        "nanhunt.cli nanhunt.store nanhunt.report.terminal nanhunt.causes nanhunt.analysis "
        "nanhunt.gate nanhunt.health nanhunt.report.health nanhunt.objective "
        "nanhunt.report.gated.sarif nanhunt.testing nanhunt.adapters.pytest_plugin"
    )
    code = (
        f"import sys, nanhunt, {', '.join(plain.split())}; "
        "print([name for name in ('torch', 'numpy', 'pandas') if name in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.stdout, ran.stderr) == ("[]\n", "")


def test_public_names():
    """`__all__` is sorted, complete and every name in it resolves; others are refused."""
    assert sorted(nanhunt.__all__) == nanhunt.__all__
    assert set(nanhunt._HOMES) == set(nanhunt.__all__) == set(dir(nanhunt))
    assert all(getattr(nanhunt, name).__name__ == name for name in nanhunt.__all__)
    with pytest.raises(AttributeError, match=r"^module 'nanhunt' has no attribute 'detective'$"):
        _ = nanhunt.detective


def test_no_module_bears_the_name_of_a_public_function():
    """Importing such a submodule would overwrite the function."""
    assert set(LEVELS).isdisjoint(nanhunt.__all__)


@pytest.mark.parametrize("name", EVERY)
def test_sizes(name):
    """No function over 60 lines, no file over 400, no `__init__` over 40."""
    file = modules(name.partition(".")[0])[name]
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= (40 if file.name == "__init__.py" else 400)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [n for n in ast.walk(tree(file)) if isinstance(n, kinds)]
    assert [f.name for f in functions if (f.end_lineno or 0) - f.lineno + 1 > 60] == []


@pytest.mark.parametrize("name", EVERY)
def test_docstrings(name):
    """Every module and every public class, function and method says what it is for."""
    file = modules(name.partition(".")[0])[name]
    assert list(undocumented(tree(file))) == []


def undocumented(node):
    """Names of public definitions without a docstring."""
    if ast.get_docstring(node) is None:
        yield getattr(node, "name", "the module")
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for inner in node.body if isinstance(node, ast.Module | ast.ClassDef) else ():
        if isinstance(inner, kinds) and not inner.name.startswith("_"):
            yield from undocumented(inner)


def test_readme_has_both_commands():
    """The two lines with which a reader starts stand in the README as they are tested."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert [command for command in README_COMMANDS if command not in map(str.strip, lines)] == []


def test_continuous_integration_runs_the_readme_command():
    """`.ci/run` ends with the README's test command, and is executable."""
    script = ROOT / ".ci" / "run"
    assert script.read_text(encoding="utf-8").splitlines()[-1] == README_COMMANDS[1]
    assert script.stat().st_mode & 0o111


def requirements():
    """Every requirement of the project, also of its extras."""
    extras = PROJECT["project"]["optional-dependencies"].values()
    listed = [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]
    return {r.name: r for r in map(Requirement, listed)}


def pins():
    """The pinned version of every package of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_pins_satisfy_the_bounds():
    """What is pinned is what pyproject.toml asks for, and nothing asked for is left unpinned."""
    assert set(pins()) == set(requirements())
    unfit = [n for n, pin in pins().items() if not requirements()[n].specifier.contains(pin)]
    assert unfit == []


def test_tests_run_with_at_least_the_lower_bounds():
    """The bounds do not promise more than the installed packages that these tests run with."""
    names = [Requirement(line).name for line in PROJECT["project"]["dependencies"]]
    assert [n for n in names if not requirements()[n].specifier.contains(version(n))] == []


def entries():
    """Every console script and entry point of pyproject.toml."""
    groups = PROJECT["project"]["entry-points"]
    scripts = PROJECT["project"]["scripts"]
    yield from (EntryPoint(name, value, "console_scripts") for name, value in scripts.items())
    for group, rows in groups.items():
        yield from (EntryPoint(name, value, group) for name, value in rows.items())


@pytest.mark.parametrize("entry", list(entries()), ids=lambda entry: entry.name)
def test_entry_points_resolve(entry):
    """What pyproject.toml promises to installers is there; all but a plugin can be called."""
    assert callable(entry.load()) or entry.group == "pytest11"
