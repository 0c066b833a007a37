"""The package as it is installed: what the wheel holds, and how soon the command line answers."""

import os
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the source archive, built from a copy of the tracked files."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools 77 or newer builds")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("nanhunt", "ris_model"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    code = (
        "import sys; from setuptools import build_meta as build; out = sys.argv[1]\n"
        "build.build_wheel(out); build.build_sdist(out)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=copy, check=True, capture_output=True
    )
    [wheel], [source] = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, source


def test_wheel_holds_what_is_needed(built):
    """Every module, the marks of a typed package, the templates of the page, and the licence."""
    wheel, source = built
    inside = set(zipfile.ZipFile(wheel).namelist())
    modules = {p.relative_to(ROOT).as_posix() for n in ("nanhunt", "ris_model")
               for p in (ROOT / n).rglob("*.py")}  # fmt: skip
    assert modules <= inside
    assert {"nanhunt/py.typed", "ris_model/py.typed"} <= inside
    templates = (ROOT / "nanhunt/report/html/templates").iterdir()
    assert {p.relative_to(ROOT).as_posix() for p in templates} <= inside
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    assert not [name for name in inside if name.startswith(("tests/", "benchmarks/", "docs/"))]
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "nanhunt/py.typed"} <= names


def test_wheel_runs_without_the_heavy_packages(built, tmp_path):
    """Unpacked beside typer alone it answers `--help`: neither torch nor numpy is asked for."""
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(tmp_path)  # noqa: S202 - built above
    blocked = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'pandas', 'scipy', 'jinja2', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "sys.argv = ['nanhunt', '--help']\n"
        "from nanhunt.cli import main\n"
        "import nanhunt\n"
        "assert nanhunt.__file__.startswith(sys.path[0])\n"
        "main()\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", blocked.replace("sys.path[0]", repr(str(tmp_path)))],
        capture_output=True, text=True, check=False, env=env, cwd=tmp_path,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "replay" in ran.stdout
    assert ran.stderr == ""


def help_seconds():
    """Processor time of one `nanhunt --help` in a process of its own."""
    before = os.times()
    subprocess.run(
        [sys.executable, "-m", "nanhunt", "--help"], check=True, capture_output=True, cwd=ROOT
    )
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4])


def test_help_is_quick():
    """The command line answers in half a second of the processor; the best of five counts."""
    assert min(help_seconds() for _ in range(5)) <= 0.5


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_shown(shell):
    """`--show-completion` prints a script for the shell, which asks the program for words."""
    words = [sys.executable, "-m", "nanhunt", "--show-completion", shell]
    quiet = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    ran = subprocess.run(words, capture_output=True, text=True, check=False, env=quiet)
    assert ran.returncode == 0, ran.stderr
    assert "_NANHUNT_COMPLETE=complete" in ran.stdout


def test_completion_completes():
    """What the script asks for is answered: the commands that begin as typed."""
    env = {
        **os.environ, "_NANHUNT_COMPLETE": "complete_bash", "COMP_WORDS": "nanhunt re",
        "COMP_CWORD": "1",
    }  # fmt: skip
    start = time.perf_counter()
    ran = subprocess.run(
        [sys.executable, "-m", "nanhunt"], capture_output=True, text=True, check=False, env=env
    )
    assert {"replay", "repro"} <= set(ran.stdout.split()), ran.stderr
    assert time.perf_counter() - start < 60


def test_every_extra_is_documented():
    """Each extra of pyproject.toml stands in the docs, and none that is not there."""
    text = (ROOT / "docs" / "setup.md").read_text(encoding="utf-8")
    assert [name for name in PROJECT["optional-dependencies"] if f"`{name}`" not in text
            and f"[{name}]" not in text] == []  # fmt: skip
