"""nanhunt run, the program: it runs as Python would run it, whatever it does."""

import json
import os
import py_compile
import re
import subprocess
import sys
import zipfile

import pytest

from nanhunt import cli
from nanhunt.launch.arrival import Arrival

PROBE = '''
"""What a program can see of how it was started, and the ways in which it can end."""
import atexit, json, os, signal, sys
atexit.register(lambda: print("bye"))
main = sys.modules["__main__"]
names = "__name__ __doc__ __file__ __package__ __spec__ __builtins__ __cached__ __loader__".split()
seen = {name: repr(getattr(main, name, "none")) for name in names}
seen |= {"argv": sys.argv, "path": sys.path, "globals": sorted(globals())}
seen |= {"own": vars(main) is globals(), "hook": sys.excepthook is sys.__excepthook__}
print(json.dumps(seen | {"torch": "torch" in sys.modules}, indent=1))

def fail():
    try:
        1 / 0
    except ZeroDivisionError as error:
        raise ValueError("told") from error

def hook(kind, error, trace):
    print("hooked", kind, trace.tb_lineno, error.__traceback__ is trace, file=sys.stderr)

end = sys.argv[1] if len(sys.argv) > 1 else ""
if end == "code": sys.exit(3)
if end == "words": sys.exit("words")
if end == "none": sys.exit()
if end == "raise": fail()
if end == "interrupt": raise KeyboardInterrupt
if end == "term": sys.stdout.flush(); os.kill(os.getpid(), signal.SIGTERM)
if end == "read": print(sys.stdin.read())
if end == "debug": breakpoint()
if end == "hook": sys.excepthook = hook; fail()
'''
SPAWNING = """
import multiprocessing, sys
def square(n): return n * n, __name__
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(square, [2]), sys.argv)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the probe in every form that Python runs."""
    root = tmp_path_factory.mktemp("programs")
    for path in ("probe.py", "package/train.py", "package/__main__.py", "folder/__main__.py"):
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text(PROBE)
    (root / "package" / "__init__.py").touch()
    (root / "link.py").symlink_to(root / "package" / "train.py")
    (root / "wrong.py").write_text("def f(:\n")
    (root / "spawning.py").write_text(SPAWNING)
    (root / "empty").mkdir()
    py_compile.compile(str(root / "probe.py"), str(root / "compiled.pyc"))
    with zipfile.ZipFile(root / "archive.zip", "w") as archive:
        archive.write(root / "probe.py", "__main__.py")
    return root


def start(place, *words):
    """A program of Python."""
    streams = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *words]
    return subprocess.Popen(command, cwd=place, env=environment, text=True, **streams)


def end(process):
    """Exit code, stdout and stderr of a program; addresses are left out."""
    out, err = process.communicate("p 40 + 2\nc\n", timeout=60)
    return process.returncode, re.sub("0x[0-9a-f]+", "", out), err


@pytest.mark.parametrize(
    "words",
    [
        "probe.py --help --mode full -- -m",
        "./probe.py code",
        "probe.py words",
        "probe.py none",
        "probe.py raise",
        "probe.py interrupt",
        "probe.py term",
        "probe.py read",
        "probe.py debug",
        "probe.py hook",
        "-m package.train --epochs 3",
        "-m package raise",
        "-m package.nothing",
        "folder raise",
        "archive.zip raise",
        "compiled.pyc raise",
        "folder/../link.py",
        "wrong.py",
        "spawning.py -m",
    ],
)
def test_it_runs_as_python_runs_it(place, words):
    """Its `__main__`, its arguments, its streams, its traceback and its exit code are Python's."""
    alone = start(place, *words.split())
    watched = start(place, "-m", "nanhunt", "run", *words.split())
    (code, out, err), (ran_code, ran_out, ran_err) = end(alone), end(watched)
    told = "nanhunt: nothing to watch: torch was never imported in this process\n"
    assert (ran_code, ran_out) == (code, out)
    assert ran_err == err + ("" if words.endswith("term") else told)


def test_the_console_script_is_the_same(place):
    """Python's first path is that of the program, not that of the script that started nanhunt."""
    code = "import sys; sys.argv[0] = 'nanhunt'; from nanhunt.cli import main; main()"
    _, out, _ = end(start(place, "-c", code, "run", "probe.py"))
    assert json.loads(out[: out.index("}") + 1])["path"][0] == str(place)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["no.py"], "there is no script no.py; give a file, or -m and the name of a module"),
        (["-m", "no_such.one"], "-m no_such.one: there is no module 'no_such' on Python's path"),
        (["empty"], "empty is a folder without __main__.py; name the script in it"),
        (["--mode", "dark", "probe.py"], "--mode is light or full; got 'dark'"),
        (["--out", "probe.py", "probe.py"], "--out probe.py is a file; name a folder"),
        (["--out", "probe.py/x", "probe.py"], "--out probe.py/x is below the file "),
        (["--after-step", "-1", "probe.py"], "Invalid value for '--after-step'"),
        (["--epochs", "3", "probe.py"], "No such option: --epochs"),
        ([], "Missing argument 'SCRIPT'"),
    ],
)
def test_refusals(place, words, sentence, monkeypatch, capsys):
    """What cannot be run is refused in one sentence before anything is done, with exit code 2."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["nanhunt", "run", *words])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as info:
        cli.main()
    told = capsys.readouterr().err
    assert info.value.code == 2
    assert sentence in told
    assert told.count("\n") == 1


def test_an_arrival_is_told_when_the_module_is_there(tmp_path, monkeypatch):
    """It comes after the whole module, once, and leaves import as it was."""
    (tmp_path / "awaited.py").write_text("value = 1\n")
    (tmp_path / "other.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    told = []
    arrival = Arrival("awaited", lambda: told.append(sys.modules["awaited"].value))
    arrival.expect()
    __import__("other")
    assert told == []
    module = __import__("awaited")
    assert told == [1]
    assert "exec_module" not in vars(module.__loader__)
    assert sys.meta_path == finders
    arrival.expect()  # it is there already
    assert told == [1, 1]
    del sys.modules["awaited"]


def test_an_arrival_that_never_comes(monkeypatch):
    """What is waited for no longer, and what does not exist."""
    finders = list(sys.meta_path)
    arrival = Arrival("no_such_module", lambda: pytest.fail("it did not come"))
    arrival.expect()
    with pytest.raises(ModuleNotFoundError):
        __import__("no_such_module")
    arrival.forget()
    arrival.forget()
    assert sys.meta_path == finders
