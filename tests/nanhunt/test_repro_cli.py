"""`nanhunt replay --repro` and `nanhunt repro`: what they print, write and refuse."""

import json
import sys
from dataclasses import replace

import pytest

from nanhunt import cli, store
from nanhunt.repro import folder as handing_over
from nanhunt.repro.script import OPERANDS, SCRIPT

PLANT = """
import torch
from torch import nn

FACTOR = 0.0


def step(loss, value=1.0):
    torch.manual_seed(0)
    return nn.Linear(3, 1), torch.full((4, 3), value), loss


def sick(factor=0.0):
    return step(lambda model, x: (model(x) * (factor + FACTOR)).sqrt().sum())


def healthy():
    return step(lambda model, x: model(x).mean())


def poisoned():
    return step(lambda model, x: model(x).mean(), float("nan"))


def late():
    from nanhunt.subject import Subject

    def loss(model, x):
        return (model(x) * 0 + x.mean()).sqrt().mean()

    model = nn.Linear(3, 1)
    batches = [torch.ones(4, 3) * k for k in (3.0, 2.0, -1.0, 1.0)]
    return Subject(model, batches, loss, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The working directory: a folder with `plant.py` and nothing else; no second Python starts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(handing_over, "_ran", lambda _: (True, "gradient of self: 1 of 1"))
    (tmp_path / "plant.py").write_text(PLANT, encoding="utf-8")
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs the command line here: exit code, stdout, stderr."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["nanhunt", *words])
        monkeypatch.delitem(sys.modules, "nanhunt_subject_plant", raising=False)
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def saved(run):
    """A function that replays a planted step natively and saves its report as r.json."""

    def call(name, *words):
        plain = ("--precision", "native", "--json", "r.json")
        code, _, told = run("replay", f"plant.py:{name}", *plain, *words)
        assert (code, told) == (0, "")

    return call


def names(folder):
    """What lies in a folder."""
    return {entry.name for entry in folder.iterdir()}


def test_with_the_replay(run, place):
    """The row of the report, the folder, and the record in the JSON."""
    words = ("replay", "plant.py:sick", "--precision", "native", "--json", "r.json")
    code, told, _ = run(*words, "--repro", "shown")
    assert code == 0
    assert "repro      shown/repro.py reproduces with torch alone (" in told
    assert names(place / "shown") == {SCRIPT, OPERANDS}
    record = json.loads((place / "r.json").read_text())["repro"]
    assert (record["folder"], record["works"], record["is_backward"]) == ("shown", True, True)


def test_healthy_step(run, place):
    """There is nothing to show, and that is said."""
    words = ("replay", "plant.py:healthy", "--precision", "native", "--repro", "shown")
    code, told, _ = run(*words)
    assert code == 0
    assert told.startswith("nothing written to shown: the step as given has no culprit\n")
    assert names(place) == {"plant.py"}


def test_from_a_report(run, saved, place):
    """The command is run again, with its options, from its words alone."""
    saved("sick", "--set", "factor=0.0", "--batch", "0")
    code, told, error = run("repro", "r.json")
    assert (code, error) == (0, "")
    assert told.startswith("r-repro/repro.py reproduces with torch alone (")
    assert names(place) == {"plant.py", "r.json", "r-repro"}
    code, told, _ = run("repro", "r.json", "--out", "mine")
    assert told.startswith("mine/repro.py reproduces with torch alone (")


def test_from_a_report_of_several_steps(run, saved):
    """The steps before are taken again."""
    saved("late", "--steps", "4")
    assert store.load("r.json").batch == 2
    code, told, _ = run("repro", "r.json")
    assert code == 0
    assert "reproduces with torch alone" in told


def test_script_that_does_not_reproduce(run, saved, place, monkeypatch):
    """It is handed over and told as such, with an exit code of its own."""
    saved("sick")
    monkeypatch.setattr(handing_over, "_ran", lambda _: (None, "RuntimeError: not here"))
    code, told, _ = run("repro", "r.json")
    assert code == 1
    assert told == (
        "r-repro/repro.py does not reproduce: the script did not run to its end: "
        "RuntimeError: not here\n"
    )
    assert names(place / "r-repro") == {SCRIPT, OPERANDS}


@pytest.mark.parametrize("change", ["FACTOR = 1.0", "FACTOR = 0.0  # moved\n\n"])
def test_culprit_that_does_not_come_again(run, saved, place, change):
    """A program that has changed since: nothing is written."""
    saved("sick")
    text = PLANT.replace("FACTOR = 0.0", change).replace("(model(x) *", "(model(x).abs() *")
    (place / "plant.py").write_text(text, encoding="utf-8")
    code, told, _ = run("repro", "r.json")
    assert code == 3
    assert told.startswith("the culprit of r.json did not come again: ")
    assert names(place) == {"plant.py", "r.json"}


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("healthy", {}, "r.json names no culprit (it says healthy); give a report that names one"),
        (
            "poisoned",
            {},
            "r.json: there is nothing to run: no op made it, batch was non-finite before the step",
        ),
        (
            "sick",
            {"command": ""},
            (
                "r.json does not tell how to run it again: its command is ''; give a report that "
                "`nanhunt replay --json` wrote"
            ),
        ),
        (
            "sick",
            {"command": "nanhunt show 'r.json"},
            (
                'r.json does not tell how to run it again: its command is "nanhunt show \'r.json"; '
                "give a report that `nanhunt replay --json` wrote"
            ),
        ),
        (
            "sick",
            {"command": "nanhunt replay --no-such-option"},
            (
                "r.json: its command cannot be read again (No such option: --no-such-option); give "
                "a report that this nanhunt wrote"
            ),
        ),
        (
            "sick",
            {"command": "nanhunt replay gone.py:sick"},
            "there is no file gone.py; give path/to/file.py:factory",
        ),
    ],
)
def test_refusals(run, saved, place, name, changes, sentence):
    """One sentence, exit code 2, and nothing is written."""
    saved(name)
    store.save(replace(store.load("r.json"), **changes), "r.json")
    assert run("repro", "r.json") == (2, "", f"nanhunt: {sentence}\n")
    assert names(place) == {"plant.py", "r.json"}


@pytest.mark.parametrize(
    "words", [("repro", "r.json", "--out"), ("replay", "gone:gone", "--repro")]
)
def test_folder_of_somebody_else(run, saved, place, words):
    """It is refused before the work and left as it is."""
    saved("sick")
    (place / "mine").mkdir()
    (place / "mine" / "notes.txt").write_text("mine")
    assert run(*words, "mine") == (
        2,
        "",
        (
            "nanhunt: the folder mine holds something that nanhunt did not write; name a new or an "
            "empty one\n"
        ),
    )
    assert names(place / "mine") == {"notes.txt"}
