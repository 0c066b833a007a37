"""What a reader sees: gold texts, widths, colour, hostile data, and the words for each outcome."""

import contextlib
import io
import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from nanhunt import store
from nanhunt.errors import StoreError, UsageError
from nanhunt.records import Answer, Group, Pace, Report, Run
from nanhunt.report import FORMS, renderer

GOLD = Path(__file__).parents[1] / "gold"
ROOT = Path(__file__).parents[2]


def shown(report, width=100, *, color=None):
    """The report as a console of that width prints it."""
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=color is not None,
        color_system=color,
        legacy_windows=False,
    )
    console.print(renderer("terminal")(report))
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("incident", 100),
        ("incident", 80),
        ("healthy", 100),
        ("at_risk", 100),
        ("unexplained", 100),
        ("double", 80),
        ("course", 100),
    ],
)
def test_gold(name, width, request):
    """Each kind of report reads exactly as it was agreed on."""
    text = shown(request.getfixturevalue(f"{name}_report"), width)
    file = GOLD / f"{name}_{width}.txt"
    if os.environ.get("NANHUNT_UPDATE_GOLD") == "1":
        GOLD.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_width(any_report, width):
    """No line is wider than the console, and none ends in spaces."""
    for line in shown(any_report, width).splitlines():
        assert cell_len(line) <= width
        assert line == line.rstrip()


@pytest.mark.parametrize("width", [1, 7, 20, 39])
def test_tiny_width(any_report, width):
    """A console too narrow for the layout still gets text that fits."""
    assert max(cell_len(line) for line in shown(any_report, width).splitlines()) <= width


def test_colour_repeats_words(any_report):
    """Without its colours the text is the one that a console without colour gets."""
    console = Console(file=io.StringIO(), width=80, record=True, color_system="truecolor")
    console.print(renderer("terminal")(any_report))
    assert console.export_text(styles=False) == shown(any_report, 80)
    assert "\x1b[" in shown(any_report, 80, color="standard")


def test_hostile_text_is_literal(hostile_report):
    """Markup in data is shown as it is and control characters are escaped."""
    text = shown(hostile_report, 140)
    assert "[red]x[/red]\\x1b[31m\\r\\nnext\\tline" in text
    assert "\\u202e" in text
    assert "\\ud800" in text
    assert all(char.isprintable() or char == "\n" for char in text)


def test_verdict_in_first_screen(incident_report):
    """What, where, why and the cure stand within the first 24 lines at 80 columns."""
    screen = "\n".join(shown(incident_report, 80).splitlines()[:24])
    for words in (
        "CULPRIT  the loss is finite (4.912); 64 of 85 gradients are not",
        "linalg_eigh, in its backward · LinalgEighBackward0 → div_",
        "ris_model/losses.py:214 in align",
        "loss term align",
        "degenerate_decomposition",
        "without lam_align           finite (replayed)",
    ):
        assert words in screen


def test_healthy_is_short(healthy_report):
    """A healthy report is a handful of lines without a table."""
    lines = shown(healthy_report).splitlines()
    assert len(lines) == 6
    assert "Runs" not in "\n".join(lines)


def test_pace_of_a_healthy_course(healthy_report):
    """A healthy report shows the steps as well, and that all of them were finite."""
    pace = tuple(Pace(i, 4.0 - i, 2.0, 1.5) for i in range(3))
    lines = shown(replace(healthy_report, steps=3, pace=pace)).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(" Steps"))
    assert lines[at].split() == ["Steps", "loss", "‖g‖", "total", "largest", "parameter", "before"]
    assert [line.split() for line in lines[at + 1 : at + 5]] == [
        ["0", "4", "2", "1.5"],
        ["1", "3", "2", "1.5"],
        ["2", "2", "2", "1.5"],
        ["3", "of", "3", "steps", "taken;", "all", "finite"],
    ]


def test_step_that_was_left_out(course_report):
    """It has no loss, and no gradient: that is not NaN."""
    left = replace(course_report.pace[-2], loss=math.nan, gradient=math.nan, skipped=True)
    text = shown(replace(course_report, pace=(*course_report.pace[:-2], left)))
    row = next(line for line in text.splitlines() if "left out" in line)
    assert row.split() == ["10", "left", "out", "by", "train_step", "–", "–", "1.625"]


def test_pace_of_a_course_that_failed(course_report, incident_report):
    """The last few steps, which one was skipped, and how many were taken."""
    text = shown(course_report)
    rows = text[text.index("\n Steps") + 1 :].splitlines()
    assert [row.split()[0] for row in rows[1:9]] == ["4", "5", "6", "7", "8", "9", "10", "11"]
    assert rows[3].startswith(" 6 skipped by the scaler ")
    assert rows[8].split() == ["11", "nan", "nan", "1.688"]
    assert rows[9] == " 12 of 40 steps taken; the last one failed"
    assert "module norm · float32 · step 10" in text
    assert "Steps" not in shown(incident_report)
    assert " step 0" not in shown(incident_report)


def test_step_of_bad_data_is_not_told_twice(course_report):
    """What was not finite before the step has no step of its own."""
    data = replace(course_report.culprits[0], phase="data", op="input", where="batch[0]", step=0)
    assert "· step" not in shown(replace(course_report, culprits=(data,)))


@pytest.mark.parametrize("run", [Run("fp16", raised="no kernel"), Run("fp16", loss=math.inf)])
def test_healthy_with_doubt_shows_runs(healthy_report, run):
    """A healthy report shows its runs where one of them raised or was non-finite."""
    text = shown(replace(healthy_report, runs=(*healthy_report.runs, run), precision="see fp16"))
    assert " Runs " in text
    assert text.count("see fp16") == 1


def test_healthy_precision(healthy_report):
    """A healthy report without a table still tells what the precisions showed."""
    assert "Precision    all agree" in shown(replace(healthy_report, precision="all agree"))


def test_raised_run_is_one_line(incident_report):
    """The error of a variant takes one line, whatever its length."""
    run = Run("fp8", raised="RuntimeError: " + "x" * 500 + "\nand a stack")
    lines = shown(replace(incident_report, runs=(run,)), 80).splitlines()
    [row] = [line for line in lines if "raised: RuntimeError" in line]
    assert row.startswith(" fp8")
    assert row.endswith("…")
    assert "raised: (no message)" in shown(replace(incident_report, runs=(Run("a", raised=""),)))


def test_many_groups_are_summed(double_report):
    """With many groups the total norm stands first and groups follow as far as they fit."""
    assert "‖g‖ total  embedding  stem  non-finite" in shown(double_report, 80)
    assert "neck  classifier" in shown(double_report, 140)
    assert "‖g‖ total  non-finite" in shown(double_report, 60)


def test_total_norm():
    """A NaN in any group makes the total NaN; huge norms do not overflow on the way."""
    huge = tuple(Group(name, 3e200, 0, 1) for name in "abcd")
    run = Run("native", loss=0.0, groups=huge)
    assert "0     6e+200     3e+200" in shown(Report("s", 0, "unexplained", runs=(run,)))
    run = replace(run, groups=(Group("e", math.inf, 1, 1), Group("f", math.nan, 1, 1), *huge))
    assert "0     nan        inf" in shown(Report("s", 0, "unexplained", runs=(run,)))


def test_footnotes_are_shared(incident_report):
    """Runs with the same remark share one mark."""
    run = incident_report.runs[4]
    text = shown(replace(incident_report, runs=(run, replace(run, variant="other"))))
    assert text.count("scale 65536") == 1
    assert "other ¹" in text


def test_differing_lines_are_shown(incident_report):
    """Where variants disagree about the line, the table has a column for it."""
    other = replace(incident_report.runs[1], culprit_line="ris_model/losses.py:99")
    runs = (incident_report.runs[0], other)
    assert "ris_model/losses.py:99" in shown(replace(incident_report, runs=runs), 120)


def test_no_ablation_is_said(incident_report):
    """A report without ablations says that no cure was sought."""
    text = shown(replace(incident_report, ablations=(), twins=()))
    assert "cure       not sought: no ablation was replayed" in text
    assert " Ablations" not in text


def test_doubtful_cure_is_said(incident_report):
    """A cure whose effect could not be verified is not sold as proven."""
    cure = replace(incident_report.ablations[1], took_effect=None)
    text = shown(replace(incident_report, ablations=(cure,)))
    assert "finite (replayed; cannot tell whether it took effect)" in text


def test_many_ablations_are_cut(incident_report):
    """The verdict lists five ablations, cures first, and the table all of them."""
    some = [replace(incident_report.ablations[0], names=(f"w{i}",)) for i in range(8)]
    text = shown(replace(incident_report, ablations=(*some, incident_report.ablations[1])))
    verdict, table = text.split(" Ablations ")
    assert verdict.index("without lam_align") < verdict.index("without w0")
    assert "without w4" not in verdict
    assert "… 4 more below" in verdict
    assert "− w7" in table


def test_at_risk_without_finding(at_risk_report):
    """Without a finding the op of the failing variant tells where."""
    text = shown(replace(at_risk_report, culprits=()))
    assert "where      exp · float16\n            examples/contrast.py:41\n" in text


def test_unknown_cause_is_said(double_report):
    """A culprit that matches no known cause says so, unless something else explains it."""
    bare = replace(double_report.culprits[0], explanation="")
    words = "why        no known cause matches the evidence"
    assert words in shown(replace(double_report, culprits=(bare,)))
    named = replace(bare, cause="pole")
    assert " why " not in shown(replace(double_report, culprits=(named,)))


def test_missing_facts():
    """A report with nothing but a verdict is still a sentence."""
    for verdict, words in {
        "healthy": "HEALTHY  loss and gradients are finite",
        "culprit": "CULPRIT  the step is non-finite",
        "unexplained": "UNEXPLAINED  the step is non-finite; cannot tell why",
        "at_risk": "AT RISK  finite natively, non-finite in another variant",
    }.items():
        assert words in shown(Report("s", 0, verdict))


def test_damaged_reports_render(incident_report, damage):
    """Whatever can be read can be shown."""
    rng = random.Random(11)  # noqa: S311
    text = store.dump(incident_report)
    for _ in range(150):
        with contextlib.suppress(StoreError):
            assert shown(store.parse(json.dumps(damage(json.loads(text), rng))), 80)


def test_unknown_form():
    """An unknown form is refused with the known ones."""
    with pytest.raises(UsageError) as caught:
        renderer("pdf")
    assert str(caught.value) == "'pdf' is no form of a report; known: " + ", ".join(sorted(FORMS))


def test_showing_needs_no_torch(incident_report, tmp_path):
    """Reading and rendering a saved report leaves torch unloaded."""
    store.save(incident_report, tmp_path / "report.json")
    code = (
        "import sys; from rich.console import Console\n"
        "from nanhunt import store; from nanhunt.report import renderer\n"
        "Console(width=80).print(renderer('terminal')(store.load(sys.argv[1])))\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "report.json"],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        check=False,
        encoding="utf-8",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "CULPRIT" in done.stdout


@pytest.mark.parametrize("width", [60, 80, 100])
def test_diagnosis_has_every_answer(incident_report, width):
    """Each question stands with its answer, and the evidence is wrapped, never cut or too wide."""
    answers = (
        Answer("gone_in_fp64", "gone in FP64?", "no", "the op ran in complex128 and failed too"),
        Answer("silent_term", "a term silently 0?", "cannot tell", "one scalar " + "[red]x " * 30),
    )
    text = shown(replace(incident_report, diagnosis=answers), width)
    section = text.split("Diagnosis", 1)[1]
    assert " ".join(section.split()).startswith("gone in FP64? no the op ran in complex128")
    assert "cannot tell" in section
    assert section.count("[red]x") == 30
    assert all(cell_len(line) <= width for line in text.splitlines())
