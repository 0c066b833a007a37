"""Every command and every block of code in the README and the docs runs.

Python runs as it stands, block after block of one page, after what the page takes as given. Of each
command line the first rule that fits says how it is run: as it stands, in a smaller form, or by
whom else. A line or a block that no rule covers fails.
"""

import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from nanhunt import hunt, store
from nanhunt.cli import main as nanhunt
from nanhunt.gate.reading import read_policy
from ris_model.__main__ import main as ris_model

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")],
    key=lambda page: page.name,
)
PROGRAMS = {"nanhunt": nanhunt, "ris-model": ris_model}

SETTING = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x, y = torch.randn(6, 8), torch.randn(6)
loader = [(x, y), (x, y)]
def loss_fn(model, x, y=torch.zeros(6)):
    out = model(x) if callable(model) else model
    return (out.squeeze(-1) - y).square().mean()
"""
# What the blocks of a page take as given.
GIVEN = {
    "README.md": SETTING,
    "detect.md": SETTING + "plain = loss_fn\nloss_fn = lambda out, y: plain(out, y)\n"
    "def loss_fn(out, y): return (out.squeeze(-1) - y).square().mean()\n",
    "gate.md": SETTING,
    "causes.md": SETTING + "from types import SimpleNamespace\n"
    "self, dim = nn.Module(), 3\n"
    "z = torch.randn(2, 3)\n"
    "a, b, p = torch.tensor([0, 1]), torch.tensor([1, 0]), torch.rand(4)\n"
    "logp = torch.randn(5, 2, 3).log_softmax(-1)\n"
    "n, m = torch.tensor([5, 5]), torch.tensor([2, 2])\n"
    "policy = torch.randn(2, 2).log_softmax(-1)\n"
    "y = torch.tensor([[1, 1], [1, 2]])\n"
    "allowed, hard, pred = torch.tensor([True, False]), torch.randn(0), torch.randn(3)\n",
    "capsule.md": SETTING + "import nanhunt\nbatch, step = (x, y), 4217\n"
    "def build(): return model, batch, loss_fn\n"
    "from pathlib import Path\nfrom nanhunt.capsule import capture, write_capsule\n"
    "name = Path('step-00004217-rank-0-1f3a9c02.capsule')\n"
    "write_capsule(capture(model, batch), name)\n",
    "health.md": SETTING + "import nanhunt, optuna, pandas\n"
    "from nanhunt.records import Figures\nfrom nanhunt.report.health import Journal\n"
    "optuna.logging.set_verbosity(optuna.logging.ERROR)\n"
    "norms = (('model', 1.0),)\n"
    "figures = Figures(step=0, loss=1.0, stepped=True, why='', norms=norms, nonfinite=0)\n"
    "with Journal('figures.csv') as log: log(figures)\n"
    "study, train = optuna.create_study(), lambda lr: float('nan')\n",
    "in-your-loop.md": SETTING + "from types import SimpleNamespace\n"
    "batch = SimpleNamespace(x=x, y=y)\nloader = [batch, batch]\n"
    "def loss_fn(out, y): return (out.squeeze(-1) - y).square().mean()\n",
    "repro.md": "import torch\nfrom pathlib import Path\n__file__ = 'repro.py'\n"
    "load_file = lambda _: {'self': torch.zeros(3), 'gradient': torch.ones(3)}\n",
}
# The script that the pages call train.py: a root at 0.
FAILING = """
import torch
from torch import nn


def build():
    model = nn.Linear(2, 1, bias=False)
    return model, (torch.zeros(4, 2),), lambda model, x: model(x).sqrt().mean()
"""
# Blocks that are texts to look at: what a program prints.
SHOWN = {"", "text"}


class Rule(NamedTuple):
    """How a command line is run: as `runs` says, or by the file `by`, which holds the words."""

    fits: str
    runs: str = ""
    by: str = ""
    words: str = ""


QUICK = " --precision fp64 --quick"
RULES = (
    # Heavy, and run elsewhere in CI.
    Rule(r"pip install -c constraints\.txt \. && nanhunt replay .*", by=".ci/run",
         words="pip install -c constraints.txt"),
    Rule(r"pip install -c constraints\.txt '\.\[test\]' && pytest", by=".ci/run",
         words="pip install -c constraints.txt '.[test]' && pytest"),
    Rule(r"pip install -c constraints\.txt '\.\[docs\]' && mkdocs build --strict", by=".ci/run",
         words="mkdocs build --strict"),
    Rule(r"pip install -c constraints\.txt -e '\.\[test,lint\]'", by=".ci/run",
         words="pip install --quiet --constraint constraints.txt '.[lint,test,docs]'"),
    Rule(r"pip install '?nanhunt(\[\w+\])?'?", by="pyproject.toml", words='name = "nanhunt"'),
    Rule(r"python -m venv \.venv && \. \.venv/bin/activate", by=".ci/run", words="-m venv"),
    Rule(r"\.ci/run", by="tests/test_house.py", words="script.stat().st_mode"),
    Rule(r"python benchmarks/(accuracy|overhead|gate|watch|run)\.py.*", runs="{script} --help"),
    # The full size takes a minute: the same in the smallest one.
    Rule(r"nanhunt replay --batch 0 --ablate lam_gap",
         runs="nanhunt replay ris:incident --set preset=tiny --batch 0 --ablate lam_gap" + QUICK),
    Rule(r"(nanhunt replay ris:\w+ --set preset=tiny.*)", runs="{0}" + QUICK),
    Rule(r"nanhunt replay train\.py:build --repro out",
         runs="nanhunt replay train.py:build --repro out" + QUICK),
    Rule(r"nanhunt replay \S+\.capsule .*", by="tests/nanhunt/test_capsule_replay.py",
         words='"--subject"'),
    Rule(r"nanhunt health figures\.csv", by="tests/nanhunt/test_health_report.py",
         words='"health"'),
    Rule(r"nanhunt run .*", by="tests/nanhunt/test_launch_processes.py", words='"nanhunt", "run"'),
    Rule(r"torchrun .* -m nanhunt run train\.py", by="tests/nanhunt/test_launch_processes.py",
         words="[*torchrun, *run[1:]]"),
    Rule(r"(nanhunt replay (train|mymodel|examples/subject)\.py:build.*)", runs="{0}" + QUICK),
    Rule(r"(nanhunt (show|explain|repro|diff|subjects|init|gate).*)", runs="{0}"),
    Rule(r"nanhunt --(show|install)-completion", by="tests/test_packaging.py",
         words="--show-completion"),
    # Of a trained checkpoint; its parts and their arguments are tested.
    Rule(r"export OMP_NUM_THREADS=1", by="tests/ris_model/conftest.py", words="one_thread"),
    Rule(r"python benchmarks/ris\.py .*", by="tests/ris_model/test_evaluation.py",
         words="def test_the_benchmark_names_its_parts"),
    # A training: tests/ris_model takes the same words at the smallest size.
    Rule(r"ris-model train .*", by="tests/ris_model/test_train_command.py", words='"train"'),
    Rule(r"ris-model evaluate .*", by="tests/ris_model/test_evaluation.py", words='"evaluate"'),
    Rule(r"ris-model search .*", by="tests/ris_model/test_tuning.py", words="--storage"),
    Rule(r"ris-model predict .*", by="tests/ris_model/test_evaluation.py", words='"predict"'),
)  # fmt: skip


class Block(NamedTuple):
    """A fenced block: where it stands, its language and its text."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page):
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```([\w-]*)[^\n]*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield Block(page, text[: found.start()].count("\n") + 1, found[1], found[2])


EVERY = [block for page in PAGES for block in blocks(page)]


def commands(block):
    """The command lines of a block; of a console those after a prompt."""
    for line in block.text.splitlines():
        words = line.removeprefix("$ ").partition("  #")[0].partition(" # ")[0].strip()
        if words and (block.language != "console" or line.startswith("$ ")):
            yield words


LINES = [
    pytest.param(command, block, id=f"{block.name} {command}"[:90])
    for block in EVERY
    if block.language in ("sh", "console")
    for command in commands(block)
]


def rule_for(command):
    """The first rule that fits, and the command as it is run; None where none does."""
    for rule in RULES:
        if found := re.fullmatch(rule.fits, command):
            script = command.split()[1] if command.startswith("python ") else ""
            return rule, rule.runs.format(*found.groups(), script=script)
    return None


def test_every_block_is_covered():
    """No block is of a language that nothing here runs or reads."""
    known = {"python", "sh", "console", "toml", "json", *SHOWN}
    assert [block.name for block in EVERY if block.language not in known] == []
    # Texts are what a program prints; what is typed or programmed has its language.
    typed = re.compile(
        r"^(\$ |import |from \w+ import |def |pip |nanhunt [a-z]+ [-\w])", re.MULTILINE
    )
    assert [b.name for b in EVERY if b.language in SHOWN and typed.search(b.text)] == []


@pytest.mark.parametrize(("command", "block"), LINES)
def test_every_command_has_a_rule(command, block):
    """It is run below, or by a file of this repository that really holds the words."""
    found = rule_for(command)
    assert found is not None, f"{block.name}: no rule of tests/test_docs.py covers {command!r}"
    rule, _ = found
    assert bool(rule.runs) != bool(rule.by)
    if rule.by:
        assert rule.words in (ROOT / rule.by).read_text(encoding="utf-8")


def test_every_rule_is_used():
    """A rule that covers nothing any more is removed."""
    used = {rule_for(line.values[0])[0] for line in LINES if rule_for(line.values[0])}
    assert set(RULES) - used == set()


def pages_of(*languages):
    """The pages that have blocks of a language."""
    return [
        pytest.param(page, id=page.name)
        for page in PAGES
        if any(block.language in languages for block in blocks(page))
    ]


@pytest.mark.parametrize("page", pages_of("python"))
def test_python_runs(page, tmp_path, monkeypatch):
    """The blocks of a page run one after the other, as a reader would take them over."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    exec(GIVEN.get(page.name, ""), names)  # noqa: S102 - what the page takes as given
    for block in blocks(page):
        if block.language == "python":
            code = compile("\n" * block.line + block.text, str(page), "exec")
            try:
                exec(code, names)  # noqa: S102 - the point of this file
            except SystemExit as left:
                assert left.code == 0, block.name  # noqa: PT017
            for name in [name for name in names if name.startswith("test_")]:
                names.pop(name)()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project as the pages speak of it: a training script, and the examples."""
    code = next(b.text for b in blocks(ROOT / "docs" / "own-model.md") if "def loss_fn" in b.text)
    build = next(b.text for b in blocks(ROOT / "docs" / "own-model.md") if "def build" in b.text)
    (tmp_path / "mymodel.py").write_text(code + build, encoding="utf-8")
    (tmp_path / "train.py").write_text(FAILING, encoding="utf-8")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize("page", pages_of("sh", "console"))
def test_commands_run(page, folder, monkeypatch, capsys):
    """The command lines of a page, one after the other, in one folder."""
    torch.set_num_threads(1)
    for block in blocks(page):
        if block.language not in ("sh", "console"):
            continue
        for command in commands(block):
            _, runs = rule_for(command)
            if runs:
                code = typed(runs, monkeypatch)
                said = capsys.readouterr()
                wanted = (0, 1) if command.startswith("nanhunt gate") else (0,)
                assert code in wanted, (block.name, command, said.err or said.out)


def typed(command, monkeypatch):
    """The exit code of a command line; what is ours is called in this process."""
    program, *words = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [program, *words])
    if program.startswith("benchmarks/"):
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / program), run_name="__main__")
        return left.value.code
    with pytest.raises(SystemExit) as left:
        PROGRAMS[program]()
    return left.value.code


@pytest.mark.parametrize("block", [b for b in EVERY if b.language == "toml"], ids=lambda b: b.name)
def test_configuration_is_read(block, tmp_path):
    """A configuration that a page shows is one that the gate takes."""
    text = block.text
    if "subject" not in tomllib.loads(text).get("tool", {}).get("nanhunt", {}):
        text = f'[tool.nanhunt]\nsubject = "train.py:build"\n{text}'
    file = tmp_path / "pyproject.toml"
    file.write_text(text, encoding="utf-8")
    assert read_policy(file).subjects


@pytest.mark.parametrize("block", [b for b in EVERY if b.language == "json"], ids=lambda b: b.name)
def test_json_is_a_report(block):
    """The report that a page shows is one that can be read."""
    assert store.parse(json.dumps(json.loads(block.text))).runs


def test_picture_is_drawn():
    """The script of the README's picture draws a report, and the picture loads no font."""
    names = runpy.run_path(str(ROOT / "docs" / "picture.py"))
    step = {}
    exec(FAILING, step)  # noqa: S102 - as train.py
    drawn = names["draw"](hunt(step["build"](), precisions=["native"]))
    kept = names["PICTURE"].read_text(encoding="utf-8")
    for svg in (drawn, kept):
        assert svg.startswith("<svg")
        assert "CULPRIT" in svg
        assert "proven" in svg
        assert not re.search(r"@font-face|url\(http|<script|<image", svg)


def test_site_builds_and_loads_nothing(tmp_path):
    """The site builds strictly, and no page loads a script, a style or a picture from afar."""
    pytest.importorskip("material", reason="mkdocs-material is not installed (extra `docs`)")
    ran = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    pages = {page.stem: page.read_text(encoding="utf-8") for page in tmp_path.glob("*.html")}
    assert {"index", "faq", "incident", "first-hunt", "own-model"} <= set(pages)
    far = re.compile(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="?https?://')
    assert [name for name, text in pages.items() if far.search(text)] == []
