"""`nanhunt gate`, `init` and `diff` as they are typed: files, exit codes, strangers' models."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from nanhunt import cli, gating, store
from nanhunt.gate import Gated
from nanhunt.records import Ablation, Finding, Group, Run

ROOT = Path(__file__).parents[2]

PLANT = """
import torch
from torch import nn


def step(loss, **more):
    return nn.Linear(3, 1), torch.ones(4, 3), loss


def healthy():
    return step(lambda model, x: model(x).square().mean())


def half():
    return step(lambda model, x: (model(x) @ model(x).T).square().mean())


def unsteady():
    calls = []
    return step(lambda model, x: calls.append(1) or model(x).mean() * len(calls))


def broken():
    raise ValueError("no data here")


def rounding():
    def loss(model, x):
        y = model(x)
        return ((y + 1e6) - 1e6).square().mean()

    return step(loss)
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a command in a folder of its own; returns exit code, standard output and error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    (tmp_path / "plant.py").write_text(PLANT, encoding="utf-8")

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["nanhunt", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        told = capsys.readouterr()
        return left.value.code, told.out, told.err

    return call


def configure(subject, *lines, variants="['native', 'fp64']"):
    """Write a configuration for one subject."""
    head = ["[tool.nanhunt]", f"subject = '{subject}'", f"variants = {variants}"]
    Path("pyproject.toml").write_text("\n".join([*head, *lines]), encoding="utf-8")


def test_incident_is_refused(run):
    """The SARIF names the line that the case report took weeks to find."""
    configure("ris:incident", "options = {preset = 'tiny'}", variants="['native']")
    code, out, _ = run("gate", "--sarif", "o.sarif", "--junit", "o.xml", "--json", "o.json")
    assert code == 1
    assert "REFUSED" in out
    [log] = json.loads(Path("o.sarif").read_text())["runs"]
    [guilty] = [one for one in log["results"] if one["ruleId"] == "NH002"]
    spot = guilty["locations"][0]["physicalLocation"]
    assert spot["artifactLocation"] == {
        "uri": "ris_model/losses/incident.py",
        "uriBaseId": "SRCROOT",
    }
    source = (ROOT / spot["artifactLocation"]["uri"]).read_text().splitlines()
    assert "torch.linalg.eigh(loaded)" in source[spot["region"]["startLine"] - 1]
    assert int(ET.parse("o.xml").getroot().get("failures")) == len(log["results"])
    body = json.loads(Path("o.json").read_text())
    assert (body["schema"], body["exit_code"], body["verdict"]) == (1, 1, "refused")
    assert body["counts"]["findings"] == len(log["results"])


def test_sound_passes(monkeypatch, capsys):
    """The gate on this repository itself, as `.ci/run` calls it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["nanhunt", "gate"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    out = capsys.readouterr().out
    assert left.value.code == 0, out
    assert "PASSED   0 findings" in out
    assert " 0 not run" in out


def test_models_of_strangers(run):
    """A GPT and a ResNet are gated as they are."""
    code, out, _ = run("gate", "--config", ROOT / "examples" / "gate.toml")
    assert code == 0, out
    assert "PASSED   0 findings · 43 passed" in out


def test_baseline(run):
    """Written on request, compared from then on; a case that is new in it was not run."""
    configure("plant.py:healthy", "baseline = 'b.json'")
    _, out, _ = run("gate")
    assert "there is no file b.json yet" in out
    assert run("gate", "--update-baseline")[0] == 0
    text = Path("b.json").read_text()
    assert "plant.py:healthy · batch 0 · seed 0" in text
    assert run("gate", "--update-baseline")[0] == 0
    assert Path("b.json").read_text() == text
    body = json.loads(text)
    body["gradient_norms"]["plant.py:healthy · batch 0 · seed 0"]["fp64"]["model"] *= 1000
    Path("b.json").write_text(json.dumps(body))
    code, out, _ = run("gate", "--markdown", "o.md")
    assert code == 1
    assert "NH008   the gradient norm of model was" in out
    assert "NH008" in Path("o.md").read_text()


@pytest.mark.parametrize(
    ("subject", "variants", "code", "sentence"),
    [
        ("plant.py:half", "['amp-fp16']", 1, "mm of the loss runs in float16"),
        ("plant.py:unsteady", "['native']", 3, "two native replays differ"),
        ("plant.py:broken", "['native']", 2, "could not be run"),
        ("plant.py:rounding", "['native', 'fp64']", 1, "the gradients differ from those in FP64"),
    ],
)
def test_exit_codes(run, subject, variants, code, sentence):
    """1 findings, 2 could not run, 3 not reproducible; the files are written each time."""
    configure(subject, variants=variants)
    left, out, _ = run("gate", "--sarif", "o.sarif", "--junit", "o.xml")
    assert left == code
    assert sentence in out
    [log] = json.loads(Path("o.sarif").read_text())["runs"]
    assert log["invocations"][0]["exitCode"] == code
    if subject == "plant.py:half":
        [first, *_] = log["results"]
        spot = first["locations"][0]["physicalLocation"]
        assert spot["artifactLocation"]["uri"] == "plant.py"
        assert "@" in PLANT.splitlines()[spot["region"]["startLine"] - 1]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (
            ["variants = ['fp63']"],
            "pyproject.toml: variants: no precision is called 'fp63'; did you",
        ),
        (["ablations = ['lam']"], "nothing to ablate is called 'lam'"),
        (["varients = []"], "[tool.nanhunt] has no key 'varients'; did you mean 'variants'?"),
    ],
)
def test_wrong_words(run, lines, sentence):
    """One sentence, exit code 2."""
    text = "\n".join(["[tool.nanhunt]", "subject = 'plant.py:healthy'", *lines])
    Path("pyproject.toml").write_text(text)
    code, out, error = run("gate")
    assert code == 2
    assert sentence in " ".join((out + error).split())


def test_from_a_folder_below(run, tmp_path, monkeypatch):
    """Paths are named from the configuration; files are written where the command runs."""
    configure("plant.py:healthy")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert run("gate", "--json", "o.json")[0] == 0
    assert (tmp_path / "below" / "o.json").is_file()


def test_no_configuration(run):
    """The way out is named."""
    Path("pyproject.toml").write_text("[project]\nname = 'x'\n")
    code, _, error = run("gate")
    assert code == 2
    assert "has no [tool.nanhunt], so there is nothing to gate; `nanhunt init` writes" in error


def test_baseline_needs_a_name(run):
    """Refused before the work."""
    configure("plant.py:healthy")
    code, _, error = run("gate", "--update-baseline")
    assert code == 2
    assert 'pyproject.toml names no file for it; add baseline = "nanhunt-baseline.json"' in error


def test_github_actions(run, monkeypatch, tmp_path):
    """Annotations and the summary come by themselves."""
    configure("plant.py:half", variants="['amp-fp16']")
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    _, out, _ = run("gate")
    assert out.startswith("::error file=plant.py,line=")
    assert summary.read_text().startswith("before\n## ❌ nanhunt gate: refused")


def test_init(run):
    """It adds to what there is, overwrites nothing, and what it writes can be gated at once."""
    Path("pyproject.toml").write_text("[project]\nname = 'x'\n")
    code, out, _ = run("init", "--subject", "plant.py:healthy")
    assert code == 0
    assert "run nanhunt gate" in out
    text = Path("pyproject.toml").read_text()
    assert text.startswith("[project]\nname = 'x'\n\n# What `nanhunt gate`")
    assert "nanhunt gate --sarif" in Path(".github/workflows/nanhunt.yml").read_text()
    assert run("gate")[0] == 0
    code, _, error = run("init")
    assert code == 2
    assert "pyproject.toml has [tool.nanhunt] already; edit it there" in error
    Path("pyproject.toml").unlink()
    code, _, error = run("init")
    assert code == 2
    assert "exists already; --no-workflow leaves it as it is" in error
    assert not Path("pyproject.toml").exists()
    assert run("init", "--no-workflow")[0] == 0


def test_explain_a_check(run):
    """A check is explained by its id."""
    assert "every gradient is finite" in run("explain", "nh002")[1]


def test_everything_is_put_back(tmp_path):
    """A gate leaves the subject as it was, to the bit."""
    import torch
    from torch import nn

    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    optimizer = torch.optim.Adam(net.parameters())
    from nanhunt.subject import Subject

    subject = Subject(net, [torch.ones(4, 3)], lambda m, x: m(x).sum(), optimizer=optimizer)
    report = gating.examine(subject, Gated("", variants=("fp64", "amp-bf16", "amp-fp16")))
    assert all(run.stepped for run in report.runs)
    after = net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(state, torch.get_rng_state())
    assert not optimizer.state


# --- diff ----------------------------------------------------------------------------------------


def test_diff(run, incident_report):
    """What differs is told with both values; what is the same is not."""
    healthy = replace(
        incident_report,
        verdict="healthy", culprits=(), headline="the loss (4.9) and 85 gradients are finite",
        runs=(Run("native", loss=4.9, groups=(Group("head", 1.0, 0, 6),)),),
        weights=(("lam_align", 0.0),),
        ablations=(Ablation(("lam_gap",), "without", requested=True, finite=True),),
    )  # fmt: skip
    store.save(incident_report, "a.json")
    store.save(healthy, "b.json")
    code, out, _ = run("diff", "a.json", "b.json")
    text = " ".join(out.split())
    assert code == 0
    assert "subject verdict − culprit + healthy" in text
    assert "weight lam_align − 0.002 + 0" in text
    assert "culprit aten::linalg_eigh · backward · align − ris_model/losses.py:214" in text
    assert "lam_subspace_align − 0 + –" in text
    assert run("diff", "a.json", "b.json", "--exit-code")[0] == 1
    code, out, _ = run("diff", "a.json", "a.json", "--exit-code")
    assert (code, out) == (0, "the two reports tell the same\n")


def test_diff_follows_a_line(run, incident_report):
    """A culprit whose line has moved is the same one."""
    [culprit, *rest] = incident_report.culprits
    moved: Finding = replace(culprit, line=220)
    store.save(incident_report, "a.json")
    store.save(replace(incident_report, culprits=(moved, *rest)), "b.json")
    _, out, _ = run("diff", "a.json", "b.json")
    assert "losses.py:214" in out
    assert "losses.py:220" in out
    assert len(out.splitlines()) <= 4


def test_two_forms_need_two_files(run):
    """Before the work: one file cannot hold two forms."""
    configure("plant.py:healthy")
    code, out, err = run("gate", "--sarif", "out", "--junit", "out")
    assert (code, out) == (2, "")
    assert err.startswith("nanhunt: --junit and --sarif both name ")
