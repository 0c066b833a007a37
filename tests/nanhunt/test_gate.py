"""The gate as a pure function: reports made by hand in, a verdict and an exit code out."""

import datetime as dt
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console

from nanhunt.errors import StoreError, UsageError
from nanhunt.gate import CHECKS, Allowance, Baseline, Gated, Limits, Policy, judge, read_policy
from nanhunt.gate.template import CONFIGURATION
from nanhunt.records import Finding, Frame, Group, HalfOp, Outcome, Report, Run, Term
from nanhunt.report.gated import actions, junit, markdown, sarif, table

NAN = math.nan
TODAY = dt.date(2026, 6, 1)
GROUPS = (Group("body", 3.0, 0, 4, error=2e-6), Group("head", 1.5, 0, 2, error=1e-7))
HEALTHY = Run(
    "native", loss=2.0, groups=GROUPS, stepped=True, loss_ops=7, half_ops=(),
    terms=(Term("fit", 1.5, has_graph=True), Term("gap", 0.5, has_graph=True)),
)  # fmt: skip
DOUBLE = replace(HEALTHY, variant="fp64", half_ops=None, loss_ops=None)
REPORT = Report(
    subject="train.py:build", batch=0, verdict="healthy", runs=(HEALTHY, DOUBLE),
    deterministic=True, weights=(("w_gap", 0.5),), configured=(("w_gap", 0.5),),
)  # fmt: skip
RULE = Gated("train.py:build", limits=Limits(norm=(0.1, 10.0), ratio=5.0), line=4)
CASE = "train.py:build · batch 0 · seed 0"
BASELINE = Baseline(
    {CASE: {"native": {"body": 3.0, "head": 1.4}, "fp64": {"body": 2.9, "head": 1.5}}}
)
EXP = Finding("forward", "aten::exp", file="train.py", line=12, explanation="It overflows.")


def judged(report=REPORT, *, rule=RULE, allowances=(), baseline=BASELINE, broken=(), required=()):
    """The outcome of one report."""
    policy = Policy(Path("/x/pyproject.toml"), (rule,), tuple(allowances), required, "b.json")
    return judge([(rule, report)], policy, baseline=baseline, today=TODAY, broken=broken)


def edited(**changes):
    """The healthy report with another native run."""
    return replace(REPORT, runs=(replace(HEALTHY, **changes), DOUBLE))


def found(outcome):
    """Check and name of every finding."""
    return [(one.check, one.name) for one in outcome.findings]


def test_healthy():
    """Every check passes and none is left out."""
    outcome = judged()
    assert outcome.exit_code == 0
    assert outcome.verdict == "passed"
    assert {one.check for one in outcome.checked} == {check.id for check in CHECKS}
    assert {one.status for one in outcome.checked} == {"passed"}


SICK = (Group("body", NAN, 3, 4), GROUPS[1])


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (edited(loss=NAN), [("NH001", "")]),
        (edited(groups=SICK), [("NH002", "")]),
        (edited(stepped_nonfinite=2), [("NH003", "")]),
        (edited(without_gradient=("a.w", "b.w")), [("NH004", "a.w"), ("NH004", "b.w")]),
        (edited(terms=(Term("gap", 0.0, has_graph=True),)), [("NH005", "gap")]),
        (edited(terms=(Term("gap", 2.0, has_graph=False),)), [("NH005", "gap")]),
        (replace(REPORT, configured=(("w_gap", 0.25),)), [("NH006", "w_gap")]),
        (replace(REPORT, configured=(("w_new", 1.0),)), [("NH006", "w_new")]),
        (replace(REPORT, deterministic=False), [("NH010", "")]),
    ],
)
def test_findings(report, expected):
    """Each fault is a finding of its own check, and of that alone."""
    assert found(judged(report)) == expected


def test_norms():
    """Bounds of each group, ratios of pairs, and of the largest to the smallest."""
    groups = (Group("body", 20.0, 0, 4), Group("head", 1.5, 0, 2))
    ids = [("NH007", "body"), ("NH007", "body/head")]
    assert found(judged(edited(groups=groups))) == ids
    limits = Limits(norms={"body": (1.0, 30.0)}, ratios={("head", "body"): (0.1, 1.0)})
    outcome = judged(edited(groups=groups), rule=replace(RULE, limits=limits))
    assert found(outcome) == [("NH007", "head/body")]
    assert "0.075, outside [0.1, 1]" in outcome.findings[0].message


def test_norms_of_a_group_that_is_not_there():
    """A bound that bounds nothing was not run, and is not passed."""
    outcome = judged(rule=replace(RULE, limits=Limits(norms={"bodi": (0.0, 1.0)})))
    unrun = [one for one in outcome.checked if one.status == "not run"]
    assert {one.message for one in unrun} == {
        "no group of parameters is called 'bodi'; groups: body, head"
    }


@pytest.mark.parametrize(("norm", "is_found"), [(29.0, False), (31.0, True), (0.2, True)])
def test_baseline(norm, is_found):
    """A norm may move by the factor, up and down."""
    groups = (replace(GROUPS[0], norm=norm), GROUPS[1])
    outcome = judged(edited(groups=groups), rule=replace(RULE, limits=Limits()))
    assert (("NH008", "body") in found(outcome)) is is_found


def test_baseline_of_other_groups():
    """A group that came or went is a finding: the baseline is out of date."""
    baseline = Baseline({CASE: {"native": {"body": 3.0, "tail": 1.0}, "fp64": {}}})
    names = [name for check, name in found(judged(baseline=baseline)) if check == "NH008"]
    assert names == ["tail", "head", "body", "head"]


def test_baseline_round_trip():
    """What is written is read again, sorted, with three digits."""
    made = Baseline.of([(CASE, edited(groups=(Group("body", 1.23456, 0, 1),)))])
    assert made.norms[CASE]["native"] == {"body": 1.23}
    assert Baseline.parse(made.dump(), "b.json") == made
    assert made.updated(BASELINE).norms == BASELINE.norms


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"schema": 2}', '{"schema": 1, "gradient_norms": {"a": {"b": {"c": "x"}}}}'],
)
def test_wrong_baseline(text):
    """A file that is none says how to make one."""
    with pytest.raises(StoreError, match=r"^b\.json: .*--update-baseline"):
        Baseline.parse(text, "b.json")


def test_half_precision():
    """An op of the loss in half precision is named with its line; none counted is not run."""
    op = HalfOp("aten::pow", "float16", Frame("train.py", 30, "loss"), 2)
    amp = replace(HEALTHY, variant="amp-fp16", half_ops=(op,))
    [one] = judged(replace(REPORT, runs=(HEALTHY, DOUBLE, amp))).findings
    assert (one.check, one.name, one.file, one.line) == ("NH009", "pow", "train.py", 30)
    assert one.message == "pow of the loss runs in float16 (2 times)"
    inside = judged(edited(loss_ops=0))
    assert [one.message for one in inside.checked if one.status == "not run"] == [
        "the loss is computed inside the model, where it cannot be told from it"
    ]


def test_fp64():
    """The distance over all groups is that of each, weighted by its norm."""
    groups = (replace(GROUPS[0], error=0.01), replace(GROUPS[1], error=0.0))
    [one] = judged(edited(groups=groups)).findings
    assert one.check == "NH011"
    assert "by 0.0089 of their norm, more than 0.001; most in body" in one.message


def test_culprit():
    """A failing variant names what made it so, where that is known."""
    failing = replace(HEALTHY, loss=NAN, culprit="aten::exp", culprit_line="train.py:12")
    report = replace(REPORT, runs=(failing, DOUBLE), culprits=(EXP,))
    [one] = judged(report).findings
    assert one.message == "the loss is nan: exp makes the first of them. It overflows."
    assert (one.file, one.line, one.config_line) == ("train.py", 12, 4)
    other = replace(failing, variant="amp-fp16", culprit_dtype="float16", culprit_line="m.py:3")
    [one] = judged(replace(REPORT, runs=(HEALTHY, DOUBLE, other))).findings
    assert one.message == "the loss is nan: exp in float16 makes the first of them"
    assert (one.file, one.line) == ("m.py", 3)


def test_variant_that_raised():
    """It was not run, which is not passed; where it is required it is a finding."""
    report = replace(REPORT, runs=(HEALTHY, DOUBLE, Run("amp-fp16", raised="RuntimeError: no")))
    outcome = judged(report)
    assert outcome.exit_code == 0
    assert {one.check for one in outcome.checked if one.status == "not run"} >= {"NH001", "NH002"}
    required = judged(report, required=("NH001",))
    assert [one.message for one in required.findings] == [
        "is required and was not run: the variant raised RuntimeError: no"
    ]


def test_allowance():
    """A finding is let through until the day, by name; after it there are two findings."""
    report = edited(without_gradient=("a.w", "b.w"))
    one = Allowance("NH004", "later", dt.date(2026, 6, 1), "a.*")
    outcome = judged(report, allowances=[one])
    assert found(outcome) == [("NH004", "b.w")]
    assert outcome.counts["allowed"] == 1
    late = judged(report, allowances=[replace(one, until=dt.date(2026, 5, 31))])
    assert found(late) == [("NH004", "a.w"), ("NH004", "b.w"), ("NH012", "NH004")]
    assert "expired on 2026-05-31; its reason was: later" in late.findings[-1].message
    assert judged(allowances=[one]).notes == (
        "the allowance of NH004 for a.* allows nothing: remove it",
    )
    elsewhere = judged(report, allowances=[replace(one, subject="other.py:build")])
    assert len(elsewhere.findings) == 2


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (judged(), 0),
        (judged(edited(loss=NAN)), 1),
        (judged(broken=[("a", "b")]), 2),
        (judged(replace(edited(loss=NAN), deterministic=False)), 3),
    ],
)
def test_exit_codes(outcome, code):
    """What could not be run goes before what is not reproducible, and that before findings."""
    assert outcome.exit_code == code


# --- the configuration ---------------------------------------------------------------------------


def read(tmp_path, text, name="pyproject.toml"):
    """The policy of a text."""
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return read_policy(file)


def test_inheritance(tmp_path):
    """What a subject does not say itself is as in the common part, key by key."""
    policy = read(
        tmp_path,
        """
        [tool.nanhunt]
        seeds = [1, 2]
        variants = ["native"]
        thresholds = { norm = [0, 1], norms = { a = [0, 2] } }
        options = { preset = "tiny" }
        [[tool.nanhunt.subjects]]
        subject = "one.py:build"
        batches = 3
        thresholds = { norms = { b = [1, 5] }, ratios = { "a/b" = [0.1, 1] } }
        [[tool.nanhunt.subjects]]
        subject = "two.py:build"
        options = { preset = "small" }
        """,
    )
    one, two = policy.subjects
    assert (one.seeds, one.batches, one.variants) == ((1, 2), (3,), ("native",))
    assert one.limits.norms == {"a": (0.0, 2.0), "b": (1.0, 5.0)}
    assert one.limits.ratios == {("a", "b"): (0.1, 1.0)}
    assert one.limits.norm == (0.0, 1.0)
    assert (two.options, two.batches, two.line) == ({"preset": "small"}, (0,), 12)
    assert one.case(3, 1) == "one.py:build preset=tiny · batch 3 · seed 1"


def test_bare_file(tmp_path):
    """A file of its own needs no [tool.nanhunt]."""
    assert read(tmp_path, 'subject = "a.py:b"', "gate.toml").subjects[0].subject == "a.py:b"


def test_template(tmp_path):
    """What `nanhunt init` writes can be read, comments taken away too."""
    text = CONFIGURATION.replace("SUBJECT", '"a.py:b"')
    assert read(tmp_path, text).subjects[0].limits.fp64 == 1e-3
    start = text.index("# Options of the function")
    lines = [line.removeprefix("# ") for line in text[start:].splitlines()]
    live = [line for line in lines if line.startswith("[") or " = " in line]
    policy = read(tmp_path, text[:start] + "\n".join(live))
    assert policy.allowances[0].check == "NH004"
    assert policy.subjects[0].options == {"preset": "tiny"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("varients = []", "[tool.nanhunt] has no key 'varients'; did you mean 'variants'? known: "),
        ("subject = 3", "[tool.nanhunt] subject is to be a name; got 3"),
        ("batches = [-1]", "batches is to be a list of whole numbers from 0 up; got [-1]"),
        ("batches = []", "batches is to be a list of whole numbers from 0 up; got []"),
        ("seeds = true", "seeds is to be a list of whole numbers from 0 up; got True"),
        ("variants = 'fp64'", "variants is to be a list of names; got 'fp64'"),
        ("options = 1", "options is to be a table; got 1"),
        ("weights = {a = 'b'}", "weights is to be a table of numbers; got {'a': 'b'}"),
        ("require = ['NH01']", "require: no check is called 'NH01'; did you mean 'NH0"),
        (
            "thresholds = {nrm = 1}",
            "[tool.nanhunt.thresholds] has no key 'nrm'; did you mean 'norm'",
        ),
        (
            "thresholds = {norm = [2, 1]}",
            "norm is to be [smallest, largest], two numbers; got [2, 1]",
        ),
        ("thresholds = {ratios = {a = [1, 2]}}", "ratios: 'a' is to name two groups"),
        ("thresholds = {fp64 = 0}", "fp64 is to be a number above 0; got 0"),
        ("thresholds = {baseline_factor = 1}", "baseline_factor is to be a number above 1; got 1"),
        ("subjects = [{}]", "[[tool.nanhunt.subjects]] 1 names no subject; give subject = "),
        ("subjects = [{subject='a:b', batch=1}]", "has no key 'batch'; did you mean 'batches'?"),
        (
            "allow = [{}]",
            "[[tool.nanhunt.allow]] 1 has no check; an allowance has a check, a reason",
        ),
        ("allow = [{check='NH004', reason='x'}]", "has no until; an allowance has"),
        (
            "allow = [{check='NH4', reason='x', until=2026-01-01}]",
            "check: no check is called 'NH4'",
        ),
        ("allow = [{check='NH004', reason=' ', until=2026-01-01}]", "reason is to be a sentence"),
        (
            "allow = [{check='NH004', reason='x', until='soon'}]",
            "until is to be a date, as 2030-01-31",
        ),
        ("", "names no subject to gate; give subject = 'path/to/file.py:factory'"),
    ],
)
def test_wrong_words(tmp_path, text, sentence):
    """One sentence says where, what came and what would work."""
    named = "" if not text or text.startswith("subject") else "subject = 'a.py:b'\n"
    with pytest.raises(UsageError) as caught:
        read(tmp_path, f"[tool.nanhunt]\n{named}{text}\n")
    assert str(caught.value).startswith("pyproject.toml: [")
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[tool.other]", "has no [tool.nanhunt], so there is nothing to gate; `nanhunt init`"),
        ("tool = {nanhunt = 1}", "tool.nanhunt is to be a table; got 1"),
        ("a = = 1", "cannot be read as TOML"),
    ],
)
def test_no_configuration(tmp_path, text, sentence):
    """Without a configuration the way out is named."""
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text)
    assert sentence in str(caught.value)


# --- the forms -----------------------------------------------------------------------------------

HOSTILE = "<b>|`*x*`\x1b[31m\n::error::"


def sick():
    """An outcome that has one of everything, and names made to break the forms."""
    failing = replace(HEALTHY, groups=SICK, culprit="aten::exp", culprit_line="train.py:12")
    report = replace(REPORT, runs=(failing, DOUBLE), culprits=(EXP,))
    report = replace(report, configured=((HOSTILE, 1.0),))
    allowance = Allowance("NH006", "known", dt.date(2030, 1, 1))
    return judged(report, allowances=[allowance], broken=[("x · batch 0 · seed 0", HOSTILE)])


def test_table():
    """The verdict first, every finding with its line, what was not run, within the width."""
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table.render(sick()))
    text = console.export_text()
    assert text.startswith(" COULD NOT RUN   1 finding · ")
    assert "\x1b[31m" not in text
    assert "        train.py:12\n" in text
    assert "allowed: known (until 2030-01-01)" in text
    assert "Not run, and so not passed" in text
    assert max(map(len, text.splitlines())) <= 80


def test_junit():
    """The counts are those of the cases in it, and hostile text stays text."""
    root = ET.fromstring(junit.render(sick()))
    cases = root.findall(".//testcase")
    assert int(root.get("tests")) == len(cases)
    assert int(root.get("failures")) == len(root.findall(".//failure")) == 1
    assert int(root.get("errors")) == len(root.findall(".//error")) == 1
    assert int(root.get("skipped")) == len(root.findall(".//skipped"))
    [failed] = [case for case in cases if case.find("failure") is not None]
    assert (failed.get("file"), failed.get("line")) == ("train.py", "12")


def test_markdown():
    """Findings with their lines; nothing of a name is read as Markdown or HTML."""
    text = markdown.render(sick())
    assert "**NH002** finite-gradients: 3 of 6 gradients are not finite" in text
    assert "<br>`train.py:12`<br>" in text
    assert "<b>" not in text
    assert r"\|\`\*x\*\`" in text


def test_actions():
    """One line per finding, which no message can end before its time."""
    lines = actions.render(sick()).splitlines()
    assert [line.partition("::")[2].partition(" ")[0] for line in lines] == ["error", "error"]
    assert lines[1].startswith("::error file=train.py,line=12,title=NH002 finite-gradients::3 of 6")
    assert actions.render(judged()) == ""


# Property -> required keys and the allowed ones, of every object that is written here: SARIF 2.1.0,
# sections 3.13 to 3.58. The schema itself is not part of this repository.
SARIF = {
    "sarifLog": ({"version", "runs"}, {"$schema"}),
    "run": (
        {"tool"},
        {"results", "invocations", "originalUriBaseIds", "columnKind", "automationDetails"},
    ),
    "driver": ({"name"}, {"version", "rules"}),
    "rule": (
        {"id"},
        {"name", "shortDescription", "fullDescription", "help", "defaultConfiguration",
         "properties"},
    ),
    "invocation": ({"executionSuccessful"}, {"exitCode", "toolExecutionNotifications"}),
    "notification": ({"message"}, {"level"}),
    "result": (
        {"message"},
        {"ruleId", "ruleIndex", "level", "locations", "partialFingerprints", "suppressions"},
    ),
    "physicalLocation": (set(), {"artifactLocation", "region"}),
    "suppression": ({"kind"}, {"justification"}),
}  # fmt: skip
LEVELS = {"none", "note", "warning", "error"}


def fits(kind, value):
    """Whether an object has what it must, and nothing that the standard does not know."""
    required, optional = SARIF[kind]
    assert required <= set(value) <= required | optional, kind
    return value


def check_sarif(text):
    """Hold a document against the standard; returns its only run."""
    log = fits("sarifLog", json.loads(text))
    assert log["version"] == "2.1.0"
    [run] = log["runs"]
    rules = [
        fits("rule", rule) for rule in fits("driver", fits("run", run)["tool"]["driver"])["rules"]
    ]
    assert run["columnKind"] in ("utf16CodeUnits", "unicodeCodePoints")
    for rule in rules:
        assert rule["defaultConfiguration"]["level"] in LEVELS
        assert all(rule[k]["text"] for k in ("shortDescription", "fullDescription", "help"))
    for invocation in run["invocations"]:
        notes = fits("invocation", invocation)["toolExecutionNotifications"]
        assert {fits("notification", note)["level"] for note in notes} <= LEVELS
    for result in run["results"]:
        assert fits("result", result)["level"] in LEVELS
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["message"]["text"]
        for location in result["locations"]:
            spot = fits("physicalLocation", location["physicalLocation"])
            uri, base = spot["artifactLocation"]["uri"], spot["artifactLocation"]["uriBaseId"]
            assert not uri.startswith("/")
            assert ".." not in uri
            assert base in run["originalUriBaseIds"]
            assert spot["region"]["startLine"] >= 1
        for one in result.get("suppressions", ()):
            assert fits("suppression", one)["kind"] in ("inSource", "external")
    return run


def test_sarif():
    """The guilty line, the rule, what was allowed, and what could not be run."""
    run = check_sarif(sarif.render(sick()))
    first, second = run["results"]
    spot = first["locations"][0]["physicalLocation"]
    assert (spot["artifactLocation"]["uri"], spot["region"]["startLine"]) == ("train.py", 12)
    assert first["ruleId"] == "NH002"
    assert second["level"] == "note"
    assert second["suppressions"][0]["justification"] == "known (until 2030-01-01)"
    [invocation] = run["invocations"]
    assert not invocation["executionSuccessful"]
    assert invocation["exitCode"] == 2


@pytest.mark.parametrize("file", ["/home/me/train.py", "C:\\me\\train.py", "../train.py", None])
def test_sarif_without_a_path_of_this_machine(file):
    """A line that lies elsewhere is told in the message; the place is the configuration."""
    failing = replace(HEALTHY, loss=NAN)
    report = replace(REPORT, runs=(failing, DOUBLE), culprits=(replace(EXP, file=file),))
    text = sarif.render(judged(report))
    spot = check_sarif(text)["results"][0]["locations"][0]["physicalLocation"]
    assert spot["artifactLocation"]["uri"] == "pyproject.toml"
    assert spot["region"]["startLine"] == 4
    assert "/home/me" not in text
    assert ("train.py:12" in text) is (file is not None)


def test_empty_outcome():
    """Every form can tell of nothing."""
    empty = Outcome(())
    assert check_sarif(sarif.render(empty))["results"] == []
    assert ET.fromstring(junit.render(empty)).get("tests") == "0"
    assert "passed" in markdown.render(empty)
