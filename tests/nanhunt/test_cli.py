"""The command line: what it prints where, its exit codes, and one sentence for every wrong word."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

from nanhunt import cli, loading, store
from nanhunt.causes import CAUSES, causes_of
from nanhunt.commands.screen import check_folder, wide_console
from nanhunt.errors import UsageError

PLANT = """
import sys
import warnings

import torch
from torch import nn


def step(loss, batch=None, *, model=None):
    return model or nn.Linear(3, 1), batch if batch is not None else torch.ones(4, 3), loss


def healthy():
    return step(lambda model, x: model(x).pow(2).mean())


def sick():
    def loss(model, x):
        y = model(x)
        return {"fit": y.pow(2).mean(), "spread": torch.sqrt((y * 0).sum())}

    return step(loss)


def poisoned():
    return step(lambda model, x: model(x).mean(), torch.full((4, 3), float("nan")))


def unsteady():
    calls = []

    def loss(model, x):
        calls.append(1)
        return model(x).mean() * len(calls)

    return step(loss)


def talks():
    def loss(model, x):
        print("model speaks")
        return model(x).mean()

    return step(loss)


def vector():
    return step(lambda model, x: model(x))


def detached():
    return step(lambda model, x: model(x).mean().detach())


def number():
    return step(lambda model, x: model(x).mean().item())


def vector_term():
    return step(lambda model, x: {"fit": model(x)})


def text_term():
    return step(lambda model, x: {"fit": "low"})


def no_terms():
    return step(lambda model, x: {})


def frozen():
    return step(lambda model, x: model(x).mean(), model=nn.Linear(3, 1).requires_grad_(False))


def late():
    from nanhunt.subject import Subject

    def loss(model, x):
        return (model(x) * 0 + x.mean()).sqrt().mean()

    model = nn.Linear(3, 1)
    batches = [torch.ones(4, 3) * k for k in (3.0, 2.0, -1.0, 1.0)]
    return Subject(model, batches, loss, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def fails():
    raise OSError("no data")


def exits():
    sys.exit(0)


def exits_in_the_loss():
    return step(lambda model, x: sys.exit(0))


def raises():
    def loss(model, x):
        raise IndexError("row 9\\nof 4")

    return step(loss)


def raises_in_the_backward():
    def refuse(gradient):
        raise ArithmeticError("no gradient")

    def loss(model, x):
        y = model(x)
        y.register_hook(refuse)
        return y.mean()

    return step(loss)


def wrong_arguments():
    return step(lambda model: model, (torch.ones(4, 3), 1))


def interrupted():
    def loss(model, x):
        raise KeyboardInterrupt

    return step(loss)


def sized(width=3):
    return step(lambda model, x: model(x).mean(), torch.ones(4, width), model=nn.Linear(width, 1))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory: a folder with `plant.py` and nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "nanhunt_subject_plant", raising=False)
    (tmp_path / "plant.py").write_text(PLANT, encoding="utf-8")
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs the command line here: exit code, stdout, stderr."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["nanhunt", *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code, *capsys.readouterr()

    return call


def replay(name, *words):
    """The words that replay one of the planted steps natively."""
    return ("replay", f"plant.py:{name}", "--precision", "native", *words)


# -- what it prints, and the exit codes ------------------------------------------------------------


def test_healthy_step(run):
    """Exit code 0 and a report on stdout; nothing on stderr where nobody watches."""
    code, out, err = run(*replay("healthy"))
    assert (code, err) == (0, "")
    assert out.startswith(f"nanhunt {version('nanhunt').partition('.dev')[0]} · plant.py:healthy")
    assert "HEALTHY" in out


@pytest.mark.parametrize(("name", "code"), [("sick", 1), ("poisoned", 1), ("healthy", 0)])
def test_exit_code_of_a_culprit(run, name, code):
    """1 on a culprit, but only if it is asked for."""
    assert run(*replay(name, "--exit-code"))[0] == code
    assert run(*replay(name))[0] == 0


def test_exit_code_of_an_unsteady_step(run):
    """3 where two native replays disagree, but only if it is asked for."""
    code, out, err = run(*replay("unsteady", "--exit-code"))
    assert (code, err) == (3, "")
    assert "two native replays differ" in out
    assert run(*replay("unsteady"))[0] == 0


def test_culprit_and_its_cure(run):
    """The op, the line and what was ablated stand in the report."""
    code, out, _ = run(*replay("sick", "--ablate", "fit"))
    assert code == 0
    assert f"plant.py:{line_of('return {')} in sick.<locals>.loss" in out
    assert re.search(r"without spread +finite \(replayed\)", out)
    assert re.search(r"without fit +still non-finite \(replayed\)", out)


def test_equal_code_in_two_files_is_told_apart(run, folder):
    """Python takes two functions for equal whatever their file; the report names the right one."""
    for name in ("first", "second"):
        (folder / f"{name}.py").write_text(PLANT, encoding="utf-8")
        out = run("replay", f"{name}.py:sick", "--precision", "native")[1]
        assert f"{name}.py:{line_of('return {')} in sick.<locals>.loss" in out


def test_steps(run, folder):
    """The step that fails is named and so are those before it; the saved report has them too."""
    code, out, err = run(*replay("late", "--steps", "9", "--json", "r.json", "--exit-code"))
    assert (code, err) == (1, "")
    assert f"plant.py:{line_of('return (model(x) * 0')} in late.<locals>.loss" in out
    assert "float32 · step 2" in out
    assert [line.split()[0] for line in table(out, "Steps")] == ["0", "1", "2"]
    assert "3 of 9 steps taken; the last one failed" in out
    report = store.load(folder / "r.json")
    assert (report.batch, report.steps, [p.step for p in report.pace]) == (2, 9, [0, 1, 2])
    assert report.culprits[0].step == 2
    assert report.command.endswith("--steps 9 --json r.json --exit-code")
    assert run("show", "r.json") == (0, out, "")


def test_steps_from_a_batch_on(run):
    """`--batch` is the first of them; a healthy course tells how many were taken."""
    _, out, _ = run(*replay("late", "--steps", "2"))
    assert "HEALTHY" in out
    assert "2 of 2 steps taken; all finite" in out
    _, out, _ = run(*replay("late", "--steps", "3", "--batch", "3"))
    assert [line.split()[0] for line in table(out, "Steps")] == ["3", "4", "5"]
    assert "3 of 3 steps taken; all finite" in out
    assert "Steps" not in run(*replay("late"))[1]


def table(out, head):
    """The rows below the head of a table, without the line that ends it."""
    lines = [line.strip() for line in out.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith(head)) + 1
    return lines[start : next(i for i in range(start, len(lines)) if ";" in lines[i])]


@pytest.mark.parametrize("op", ["log", "aten::sqrt", "div_"])
def test_explain_an_op(run, op):
    """Every cause that an op is known for, one below the other."""
    code, out, err = run("explain", op)
    assert (code, err) == (0, "")
    found = causes_of(op)
    assert len(found) > 1
    heads = [f"{cause.slug}: {cause.title}" for cause in found]
    assert [line for line in out.splitlines() if line in heads] == heads
    assert out.count("\n\n") == len(found) - 1


def test_first_line_tells_of_the_bundled_incident(run, monkeypatch):
    """Whoever names no subject is told which one is replayed."""
    monkeypatch.setattr(loading, "BUNDLED", "plant.py:healthy")
    code, out, err = run("replay", "--precision", "native")
    assert (code, err) == (0, "")
    first, second = out.splitlines()[:2]
    assert first == "no subject given: using the bundled incident (plant.py:healthy)"
    assert second.startswith("nanhunt ")


def test_subject_of_the_project(run, folder):
    """The nearest pyproject.toml may name the subject, and is said to have done so."""
    (folder / "pyproject.toml").write_text('[tool.nanhunt]\nsubject = "plant.py:healthy"\n')
    code, out, _ = run("replay", "--precision", "native")
    assert code == 0
    assert out.splitlines()[0] == "subject plant.py:healthy from pyproject.toml"


def test_options_reach_the_factory(run):
    """`--set key=value`, also together with a seed and a device."""
    words = replay("sized", "--set", "width=5", "--seed", "3", "--device", "cpu")
    assert run(*words)[0] == 0


def test_printing_model_does_not_disturb(run, folder):
    """What a model prints comes before the report; the saved report is whole."""
    code, out, err = run(*replay("talks", "--json", "r.json"))
    assert (code, err) == (0, "")
    lines = [line for line in out.splitlines() if line]
    spoken = [i for i, line in enumerate(lines) if line == "model speaks"]
    assert spoken == list(range(len(spoken)))
    assert lines[len(spoken)].startswith("nanhunt ")
    assert store.load(folder / "r.json").verdict == "healthy"


def test_version(run):
    """Name and version, and nothing else."""
    assert run("--version") == (0, f"nanhunt {version('nanhunt')}\n", "")


def test_no_command(run):
    """The help, on stderr since nothing was done."""
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err.startswith("Usage: nanhunt [OPTIONS] COMMAND [ARGS]...\n")
    assert re.findall(r"^  (replay|show|subjects|explain) ", err, re.MULTILINE) == [
        "replay",
        "show",
        "subjects",
        "explain",
    ]


@pytest.mark.parametrize("words", [["--help"], ["replay", "--help"], ["show", "--help"]])
def test_help(run, words):
    """Help that is asked for goes to stdout."""
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    assert out.startswith("Usage: nanhunt")


def test_subjects(run):
    """Every installed subject with where it comes from."""
    code, out, err = run("subjects")
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        [entry.name, entry.value] for entry in loading.installed()
    ]


@pytest.mark.parametrize("cause", CAUSES, ids=lambda cause: cause.slug)
def test_explain(run, cause):
    """Title, explanation and what is worth trying."""
    recipes = f"worth trying: {', '.join(cause.recipes)}\n" if cause.recipes else ""
    text = f"{cause.slug}: {cause.title}\n{cause.about}\n{recipes}"
    assert run("explain", cause.slug) == (0, text, "")


# -- one sentence for everything that is refused ---------------------------------------------------

NO_GRAPH = (
    "the loss has no graph: nothing in it depends on a parameter that requires a gradient "
    "(a detach, a no_grad block, or a value taken with .item()?)"
)
SLUGS = ", ".join(cause.slug for cause in CAUSES)
PRECISIONS = "native, fp64, fp32, amp-fp16, amp-bf16, amp-fp16-net, amp-bf16-net"


def line_of(text):
    """The number of the line of the planted file that starts so."""
    return next(i for i, line in enumerate(PLANT.splitlines(), 1) if line.strip().startswith(text))


RAISED_IN_A_STEP = f"step 0 raised IndexError: row 9 of 4 (plant.py:{line_of('raise IndexError')})"

REFUSALS = [
    (("replay", "gone.py:f"), "there is no file gone.py; give path/to/file.py:factory"),
    (
        ("replay", "syntax.py:f"),
        (
            "importing the subject syntax.py:f raised SyntaxError: '(' was never closed "
            "(syntax.py, line 1)"
        ),
    ),
    (
        replay("healthy", "--precision", "fp_64"),
        f"no precision is called 'fp_64'; did you mean fp64? known: {PRECISIONS}",
    ),
    (
        replay("healthy", "--precision", "octuple"),
        f"no precision is called 'octuple'; known: {PRECISIONS}",
    ),
    (
        replay("sick", "--ablate", "lam"),
        "nothing to ablate is called 'lam'; known weights and terms: fit, spread",
    ),
    (
        replay("healthy", "--ablate", "fit"),
        (
            "nothing to ablate is called 'fit'; the loss is one scalar without named terms, and "
            "the subject gives no weights"
        ),
    ),
    (
        replay("healthy", "--ablate", "all"),
        (
            "nothing to ablate is called 'all'; the loss is one scalar without named terms, and "
            "the subject gives no weights"
        ),
    ),
    (
        replay("healthy", "--batch", "9"),
        "batch 9 is out of range: the subject has 1 (0 to 0)",
    ),
    (
        replay("healthy", "--batch", "-1"),
        "batch -1 is out of range: the subject has 1 (0 to 0)",
    ),
    (replay("late", "--steps", "0"), "so many steps cannot be taken: 0; at least 1"),
    (replay("late", "--steps", "-3"), "so many steps cannot be taken: -3; at least 1"),
    (replay("raises", "--steps", "3"), RAISED_IN_A_STEP),
    (replay("vector"), "the loss is to be a scalar; got shape [4, 1]: reduce it, as by .mean()"),
    (replay("detached"), NO_GRAPH),
    (
        replay("number"),
        "loss_fn is to return a scalar tensor or a mapping of terms; got float",
    ),
    (replay("vector_term"), "the loss term 'fit' is to be a scalar; got shape [4, 1]"),
    (replay("text_term"), "the loss term 'fit' is to be a tensor; got str"),
    (replay("no_terms"), "nothing is left of the loss; its terms: none"),
    (
        replay("frozen"),
        (
            "nothing can get a gradient: none of the model's 2 parameters requires one; "
            "unfreeze at least one"
        ),
    ),
    (
        replay("fails"),
        (
            "the factory plant.py:fails raised OSError: no data "
            f"(plant.py:{line_of('raise OSError')})"
        ),
    ),
    (
        replay("exits"),
        f"the factory plant.py:exits raised SystemExit: 0 (plant.py:{line_of('sys.exit')})",
    ),
    (
        replay("exits_in_the_loss"),
        f"the step raised SystemExit: 0 (plant.py:{line_of('return step(lambda model, x: sys')})",
    ),
    (
        replay("raises"),
        f"the step raised IndexError: row 9 of 4 (plant.py:{line_of('raise IndexError')})",
    ),
    (
        replay("raises_in_the_backward"),
        (
            "the step raised ArithmeticError: no gradient "
            f"(plant.py:{line_of('raise ArithmeticError')})"
        ),
    ),
    (
        replay("wrong_arguments"),
        (
            "the step raised TypeError: wrong_arguments.<locals>.<lambda>() takes 1 positional "
            "argument but 3 were given"
        ),
    ),
    (
        replay("healthy", "--json", "gone/r.json"),
        "--json gone/r.json: there is no folder gone; make it first",
    ),
    (replay("healthy", "--json", "."), "--json . is a folder; name a file in it"),
    (
        replay("healthy", "--html", os.devnull),
        f"--html {os.devnull} is not a regular file; name another one",
    ),
    (
        replay("healthy", "--device", "cuda"),
        "--device cuda: torch sees no CUDA device here; use cpu",
    ),
    (
        replay("healthy", "--device", "abacus"),
        "--device takes cpu or cuda; got 'abacus'",
    ),
    (
        replay("healthy", "--set", "width"),
        "--set takes key=value, as in --set preset=tiny; got 'width'",
    ),
    (
        replay("healthy", "--set", "width=3"),
        "the subject plant.py:healthy has no option 'width'; it takes none",
    ),
    (
        replay("healthy", "--seed", str(2**64)),
        f"--seed takes a whole number from -2**63 to 2**64 - 1; got {2**64}",
    ),
    (
        ("show", "gone.json"),
        "gone.json: cannot be read (no such file or directory); give a report that nanhunt saved",
    ),
    (
        ("show", "plant.py"),
        "plant.py: not JSON (Expecting value: line 2 column 1 (char 1)); save the report again",
    ),
    (("show", "."), ".: cannot be read (it is a folder); give a report that nanhunt saved"),
    (
        ("explain", "poles"),
        (
            "no cause is called 'poles', and no op of that name is known for one; did you mean "
            f"pole? known: {SLUGS}"
        ),
    ),
    (
        ("explain", "xyzzy"),
        f"no cause is called 'xyzzy', and no op of that name is known for one; known: {SLUGS}",
    ),
]


@pytest.mark.parametrize(("words", "sentence"), REFUSALS)
def test_refusals(run, folder, monkeypatch, words, sentence):
    """One sentence on stderr, nothing on stdout, exit code 2, and nothing left behind."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (folder / "syntax.py").write_text("def f(\n")
    before = sorted(folder.iterdir())
    assert run(*words) == (2, "", f"nanhunt: {sentence}\n")
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "beginning"),
    [
        (replay("healthy", "--batch", "one"), "Invalid value for '--batch': "),
        (replay("healthy", "--batch", "1.5"), "Invalid value for '--batch': "),
        (replay("healthy", "--batch"), "Option '--batch' requires an argument"),
        (replay("healthy", "--bach", "1"), "No such option: --bach"),
        (replay("healthy", "--steps", "1.5"), "Invalid value for '--steps': "),
        (replay("healthy", "--steps", "many"), "Invalid value for '--steps': "),
        (replay("healthy", "more"), "Got unexpected extra argument"),
        (("replai",), "No such command 'replai'. Did you mean 'replay'"),
        (("--nope",), "No such option: --nope"),
        (("show",), "Missing argument 'report'"),
        (("explain",), "Missing argument 'name'"),
    ],
)
def test_wrong_words(run, words, beginning):
    """What the option parser refuses is one sentence like any other."""
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"nanhunt: {re.escape(beginning)}[^\n]*\n", err)


def test_unknown_subject_is_told_what_is_installed(run):
    """The bundled ones among them."""
    code, out, err = run("replay", "nope")
    names = ", ".join(entry.name for entry in loading.installed())
    assert (code, out) == (2, "")
    assert err == (
        f"nanhunt: no subject is called 'nope'; installed subjects: {names}; "
        "or give path/to/file.py:factory or package.module:factory\n"
    )


def test_report_is_refused_before_the_work(run, monkeypatch):
    """A path that cannot be written is no reason to replay first."""
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("it was loaded"))
    assert run(*replay("healthy", "--json", "gone/r.json"))[0] == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_folder_that_cannot_be_written(run, folder):
    """The report is not shown as if it had been saved."""
    (folder / "shut").mkdir(mode=0o500)
    code, out, err = run(*replay("healthy", "--json", "shut/r.json"))
    assert (code, out) == (2, "")
    assert err.startswith("nanhunt: shut/r.json: cannot be written (permission denied)")


def test_report_that_cannot_be_saved_keeps_the_old_one(run, folder, monkeypatch):
    """Nothing half-written, and the old report is whole."""
    (folder / "r.json").write_text("old")

    def full(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = sorted(folder.iterdir())
    code, out, err = run(*replay("healthy", "--json", "r.json"))
    assert (code, out) == (2, "")
    assert err == (
        "nanhunt: r.json: cannot be written (no space left on device); "
        "give a file in a folder that exists and is writable\n"
    )
    assert sorted(folder.iterdir()) == before
    assert (folder / "r.json").read_text() == "old"


def test_refusal_leaves_an_old_report_alone(run, folder):
    """A step that cannot be run writes nothing."""
    (folder / "r.json").write_text("old")
    assert run(*replay("raises", "--json", "r.json"))[0] == 2
    assert (folder / "r.json").read_text() == "old"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 2}', '{"schema": 1}', "\0", "NaN"])
def test_corrupt_reports(run, folder, text):
    """One sentence that starts with the name of the file."""
    (folder / "r.json").write_text(text)
    code, out, err = run("show", "r.json")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"nanhunt: r\.json: [^\n]+\n", err)


def test_interrupted(run, folder):
    """Ctrl-C gives 130 and one line; nothing is left behind."""
    before = sorted(folder.iterdir())
    code, out, err = run(*replay("interrupted", "--json", "r.json"))
    assert (code, out, err.strip()) == (130, "", "nanhunt: interrupted")
    assert sorted(folder.iterdir()) == before


def test_own_mistakes_are_not_hidden(run, monkeypatch):
    """What nanhunt did not mean to raise keeps its traceback."""
    monkeypatch.setattr(store, "load", lambda _: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["nanhunt", "show", "r.json"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


# -- other processes -------------------------------------------------------------------------------


def shell(*words, **environment):
    """Run a fresh Python: exit code, stdout, stderr."""
    ran = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | environment,
    )
    return ran.returncode, ran.stdout, ran.stderr


def test_saved_report_is_shown_without_torch(run, folder):
    """What `show` prints is what `replay` printed, where torch cannot be imported at all."""
    _, printed, _ = run(*replay("sick", "--json", "r.json", "--ablate", "spread"))
    body = json.loads((folder / "r.json").read_text(), parse_constant=pytest.fail)
    assert (body["schema"], body["verdict"]) == (1, "culprit")
    words = " ".join(replay("sick", "--json", "r.json", "--ablate", "spread"))
    assert body["command"] == f"nanhunt {words}"
    (folder / "fake").mkdir()
    (folder / "fake" / "torch.py").write_text("raise ImportError('no torch here')\n")
    fake = str(folder / "fake")
    assert shell("-c", "import torch", PYTHONPATH=fake)[0] == 1
    assert shell("-m", "nanhunt", "show", "r.json", PYTHONPATH=fake) == (0, printed, "")


def test_module_is_the_command(folder):
    """`python -m nanhunt` in a process of its own: the same words, codes and streams."""
    assert shell("-m", "nanhunt", "--version") == (0, f"nanhunt {version('nanhunt')}\n", "")
    code, out, err = shell("-m", "nanhunt", *replay("exits"))
    assert (code, out) == (2, "")
    assert err.startswith("nanhunt: the factory plant.py:exits raised SystemExit: 0")


@pytest.mark.parametrize(("columns", "width"), [("80", 80), (None, 100), ("wide", 100)])
def test_piped_output_is_as_wide_as_columns_says(monkeypatch, columns, width):
    """Where nobody looks on, `COLUMNS` decides; without it, or with nonsense, 100."""
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert wide_console().width == width


def test_file_in_a_folder_that_takes_none(monkeypatch, tmp_path):
    """A folder that is not writable is refused before the work; root may write everywhere."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UsageError, match="is not writable; name another one"):
        check_folder("--json", tmp_path / "r.json")
