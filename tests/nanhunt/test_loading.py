"""Finding a subject by its name: the order of places, and every refusal with its sentence."""

import random
import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nanhunt import loading
from nanhunt.errors import NanhuntError, SubjectError, UsageError
from nanhunt.loading import find, installed, load, read_option

MODULE = """
import random
import torch
from torch import nn

CONSTANT = 3
nothing = None


def build(width=2, *, name="built"):
    model = nn.Linear(width, 1)
    return model, (torch.ones(3, width),), lambda model, x: model(x).mean()


def draws():
    model = nn.Linear(2, 1)
    model.drawn = (random.random(), float(torch.rand(())))
    return model, None, None if False else (lambda model, _: model.bias.sum())


def takes_anything(**options):
    model = nn.Linear(2, 1)
    model.options = options
    return model, None, lambda model, _: model.bias.sum()


def needs(width):
    return build(width)


def fails():
    raise RuntimeError("no data\\nhere")


def leaves():
    raise SystemExit(0)


def wrong():
    return 7


def frozen():
    return nn.Linear(2, 1).requires_grad_(False), None, lambda model, _: model.bias.sum()


def _hidden():
    pass
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory: a folder with `plant.py`; what is imported is forgotten again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "plant.py").write_text(MODULE, encoding="utf-8")
    yield tmp_path
    for name, module in tuple(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def offers(monkeypatch):
    """A function that installs subjects under names."""

    def offer(**rows):
        entries = [EntryPoint(name, value, loading.GROUP) for name, value in rows.items()]
        monkeypatch.setattr(loading, "entry_points", lambda group: entries)

    offer()
    return offer


def refusal(call, *args, error=SubjectError, **options):
    """The one line of the refusal that the call raises."""
    with pytest.raises(NanhuntError) as caught:
        call(*args, **options)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- the order of places ---------------------------------------------------------------------------


def test_installed_subjects_are_sorted_by_name(offers):
    """Of this group alone, as packages offer them."""
    offers(b="m:b", a="m:a")
    assert [entry.name for entry in installed()] == ["a", "b"]


def test_the_bundled_subjects_are_installed():
    """The one that is taken without a name is among them."""
    assert {entry.name for entry in installed()} >= {"ris", loading.BUNDLED}


def test_installed_name_comes_first(offers):
    """Even where it looks like a file."""
    offers(**{"plant.py:build": "plant:needs"})
    sys.path.insert(0, ".")
    assert find("plant.py:build").__name__ == "needs"


def test_file_and_module(offers):
    """`path.py:factory` and `module:factory`; a path may be relative or absolute."""
    assert find("plant.py:build").__module__ == "nanhunt_subject_plant"
    assert find("./plant.py:build").__name__ == "build"
    assert find("plant:build").__module__ == "plant"


def test_file_may_import_its_neighbours(folder):
    """As it could when Python ran it."""
    (folder / "deep").mkdir()
    (folder / "deep" / "neighbour.py").write_text("value = 5\n")
    (folder / "deep" / "main.py").write_text("from neighbour import value\ndef f(): ...\n")
    assert find("deep/main.py:f")() is None


# -- the default -----------------------------------------------------------------------------------


def test_default_of_the_nearest_pyproject(folder, monkeypatch, offers):
    """`[tool.nanhunt] subject`, of the nearest file upwards, and it is said which."""
    (folder / "pyproject.toml").write_text('[tool.nanhunt]\nsubject = "plant:build"\n')
    (folder / "sub").mkdir()
    monkeypatch.chdir(folder / "sub")
    sys.path.insert(0, str(folder))
    loaded = load(None)
    assert (loaded.spec, loaded.remark) == (
        "plant:build",
        "subject plant:build from pyproject.toml",
    )


@pytest.fixture
def bundled(monkeypatch, offers):
    """A small subject under the name of the bundled one."""
    offers(**{loading.BUNDLED: "plant:build"})
    sys.path.insert(0, ".")


def test_nearest_pyproject_alone_counts(folder, monkeypatch, bundled):
    """One that says nothing hides those above it; the bundled incident is taken, and said so."""
    (folder / "pyproject.toml").write_text('[tool.nanhunt]\nsubject = "nope:nope"\n')
    (folder / "sub").mkdir()
    (folder / "sub" / "pyproject.toml").write_text("[project]\n")
    sys.path.insert(0, str(folder))
    monkeypatch.chdir(folder / "sub")
    loaded = load(None)
    assert (loaded.spec, loaded.remark) == (
        "ris:incident",
        "no subject given: using the bundled incident (ris:incident)",
    )


def test_given_name_needs_no_remark(folder, offers):
    """A broken pyproject.toml does not matter where a subject is named."""
    (folder / "pyproject.toml").write_text("[")
    assert load("plant.py:build").remark == ""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[tool.nanhunt]\nsubject = 3\n", "[tool.nanhunt] subject of {} is to be a string; got 3"),
        ("[tool", "{} cannot be read: Expected ']' at the end of a table declaration (at end "),
    ],
)
def test_refuses_a_broken_pyproject(folder, offers, text, sentence):
    """The sentence names the file."""
    file = folder / "pyproject.toml"
    file.write_text(text)
    assert refusal(load, None).startswith(sentence.format(file))


@pytest.mark.parametrize(
    ("text", "key"), [("tool = 3\n", "tool"), ("[tool]\nnanhunt = 3\n", "nanhunt")]
)
def test_refuses_a_pyproject_of_another_shape(folder, offers, text, key):
    """A table that is none is told, not tripped over."""
    file = folder / "pyproject.toml"
    file.write_text(text)
    assert refusal(load, None) == f"{key} in {file} is to be a table; got 3"


# -- seeds, options, devices -----------------------------------------------------------------------


def test_factory_is_called_under_the_seed(offers):
    """The same seed draws the same, another one something else."""
    drawn = [load("plant.py:draws", seed=seed).subject.model.drawn for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[2][0]
    assert drawn[0][1] != drawn[2][1]
    random.seed(1)
    assert drawn[0][0] == random.random()  # noqa: S311 - no secret


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_refuses_a_seed_that_torch_cannot_hold(seed, offers):
    """The sentence names the range."""
    assert refusal(load, "plant.py:build", seed=seed, error=UsageError) == (
        f"--seed takes a whole number from -2**63 to 2**64 - 1; got {seed}"
    )


@pytest.mark.parametrize("seed", [2**64 - 1, -(2**63), 0])
def test_takes_the_outermost_seeds(seed, offers):
    """The range that the refusal names is the one that is taken."""
    assert load("plant.py:build", seed=seed).subject.model.in_features == 2


def test_options_reach_the_factory(offers):
    """Positional and keyword ones, and any where the factory takes any."""
    assert load("plant.py:build", options={"width": 5, "name": "n"}).subject.model.in_features == 5
    taken = load("plant.py:takes_anything", options={"a": 1}).subject.model.options
    assert taken == {"a": 1}


def test_refuses_an_unknown_option(offers):
    """The sentence lists those that the factory takes."""
    assert refusal(load, "plant.py:build", options={"wide": 1}, error=UsageError) == (
        "the subject plant.py:build has no option 'wide'; it takes width, name"
    )
    assert refusal(load, "plant.py:draws", options={"wide": 1}, error=UsageError) == (
        "the subject plant.py:draws has no option 'wide'; it takes none"
    )


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("a=1", ("a", 1)),
        (" a = [1, 2]", ("a", [1, 2])),
        ("a=tiny", ("a", "tiny")),
        ("a=True", ("a", True)),
        ("a=b=c", ("a", "b=c")),
        ("a=", ("a", "")),
        ("a='1'", ("a", "1")),
        ("a={[]: 1}", ("a", "{[]: 1}")),
        ("a=" + "(" * 5000, ("a", "(" * 5000)),
        ("a=1e400", ("a", float("inf"))),
    ],
)
def test_read_option(text, option):
    """Python literals are taken as such, everything else as text."""
    assert read_option(text) == option


@pytest.mark.parametrize("text", ["preset", "", "=3", " =3"])
def test_refuses_an_option_without_key_or_value(text):
    """The sentence shows the form."""
    assert refusal(read_option, text, error=UsageError) == (
        f"--set takes key=value, as in --set preset=tiny; got {text!r}"
    )


@pytest.mark.parametrize("device", ["meta", "gpu", "", "cpu:x"])
def test_refuses_an_unknown_device(device, offers):
    """Only two kinds of device can be replayed on."""
    assert refusal(load, "plant.py:build", device=device, error=UsageError) == (
        f"--device takes cpu or cuda; got {device!r}"
    )


def test_refuses_cuda_where_there_is_none(monkeypatch, offers):
    """Before the subject is built."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refusal(load, "nope", device="cuda:0", error=UsageError) == (
        "--device cuda:0: torch sees no CUDA device here; use cpu"
    )


# -- refusals --------------------------------------------------------------------------------------

UNKNOWN = (
    "no subject is called {!r}; installed subjects: {}; "
    "or give path/to/file.py:factory or package.module:factory"
)


@pytest.mark.parametrize("spec", ["nope", "", ":", "a:", ":b", "plant.py"])
def test_refuses_an_unknown_subject(spec, offers):
    """The sentence lists those that are installed."""
    assert refusal(find, spec) == UNKNOWN.format(spec, "none")
    offers(one="m:one", two="m:two")
    assert refusal(find, spec) == UNKNOWN.format(spec, "one, two")


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("gone.py:build", "there is no file gone.py; give path/to/file.py:factory"),
        (".py:build", "there is no file .py; give path/to/file.py:factory"),
        ("gone:build", "the subject gone:build cannot be imported: No module named 'gone'"),
        (
            "plant.py:nope",
            (
                "plant.py has no 'nope'; its functions: build, draws, takes_anything, needs, "
                "fails, leaves, wrong, frozen"
            ),
        ),
        ("empty.py:nope", "empty.py has no 'nope'; its functions: none"),
        (
            "plant.py:CONSTANT",
            (
                "plant.py:CONSTANT is not a factory but an object of type int; "
                "name a function that returns the subject"
            ),
        ),
        (
            "broken.py:build",
            (
                "importing the subject broken.py:build raised ZeroDivisionError: division by zero "
                "(broken.py:2)"
            ),
        ),
        (
            "syntax.py:build",
            (
                "importing the subject syntax.py:build raised SyntaxError: '(' was never closed "
                "(syntax.py, line 1)"
            ),
        ),
        (
            "quits.py:build",
            "importing the subject quits.py:build raised SystemExit: 0 (quits.py:2)",
        ),
        ("needy.py:f", "the subject needy.py:f cannot be imported: No module named 'not_there'"),
        (
            "plant.py:fails",
            "the factory plant.py:fails raised RuntimeError: no data here (plant.py:{fails})",
        ),
        (
            "plant.py:leaves",
            "the factory plant.py:leaves raised SystemExit: 0 (plant.py:{leaves})",
        ),
        (
            "plant.py:needs",
            (
                "the factory plant.py:needs raised TypeError: needs() missing 1 required "
                "positional argument: 'width'"
            ),
        ),
        (
            "plant.py:wrong",
            (
                "a subject is a tuple (model, batch, loss_fn) or an object with model, batches and "
                "loss_fn; got an object of type int"
            ),
        ),
        (
            "plant.py:frozen",
            (
                "nothing can get a gradient: none of the model's 2 parameters requires one; "
                "unfreeze at least one"
            ),
        ),
    ],
)
def test_refusals(folder, offers, spec, sentence):
    """Each says what was asked for, what happened and, where it can, what would work."""
    (folder / "empty.py").write_text("")
    (folder / "broken.py").write_text("\n1 / 0\n")
    (folder / "syntax.py").write_text("def build(\n")
    (folder / "quits.py").write_text("import sys\nsys.exit(0)\n")
    (folder / "needy.py").write_text("import not_there\n")
    lines = MODULE.splitlines()
    at = {name: lines.index(f"def {name}():") + 2 for name in ("fails", "leaves")}
    assert refusal(load, spec) == sentence.format(**at)


def test_refusal_of_an_installed_subject_that_is_broken(offers):
    """A package that offers what it lacks is named as it was asked for."""
    offers(ghost="ghost:build", lost="plant:lost")
    sys.path.insert(0, ".")
    assert refusal(find, "ghost") == (
        "the subject ghost cannot be imported: No module named 'ghost'"
    )
    assert refusal(find, "lost") == (
        "importing the subject lost raised AttributeError: module 'plant' has no attribute 'lost'"
    )


def test_refusal_by_a_factory_is_kept(offers, monkeypatch):
    """A sentence that is meant for the reader is not wrapped in another one."""

    def build():
        raise UsageError("choose a size")

    monkeypatch.setitem(sys.modules, "refusing", SimpleNamespace(build=build))
    assert refusal(load, "refusing:build", error=UsageError) == "choose a size"


def test_interrupt_is_no_refusal(offers, monkeypatch):
    """Ctrl-C passes through."""

    def build():
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "waiting", SimpleNamespace(build=build))
    with pytest.raises(KeyboardInterrupt):
        load("waiting:build")


def test_factory_may_train_under_no_grad(offers, monkeypatch):
    """Gradients are on while it runs, whoever calls."""
    model = nn.Linear(2, 1)
    seen = []

    def build():
        seen.append(torch.is_grad_enabled())
        return model, None, lambda model, _: model.bias.sum()

    monkeypatch.setitem(sys.modules, "graded", SimpleNamespace(build=build))
    with torch.no_grad():
        assert load("graded:build").subject.model is model
    assert seen == [True]
