"""Figures told: a file and back, a frame, scalars, a page, and the command."""

import io
import json
import math
import random
import re
import subprocess
import sys
import warnings
from dataclasses import replace

import pandas as pd
import pytest
from rich.console import Console

from nanhunt import cli
from nanhunt.errors import StoreError, UsageError
from nanhunt.health import RULES, check
from nanhunt.records import SANITISED, Figures
from nanhunt.report.health import Journal, Scalars, frame, numbers, open_log, read, render
from nanhunt.report.health.sparks import draw
from ris_model.training.journal import Epoch, Table

PLAIN = Figures(
    0,
    1.5,
    stepped=True,
    why="",
    norms=(("body", 0.1 + 0.2), ("head, two", 2.0)),
    nonfinite=0,
    rates=(1e-3, 1e-4),
    seconds=0.25,
)
STEPS = (
    PLAIN,
    replace(PLAIN, step=1, updates=(("body", 1e-3),), clipped=0.5, scheduled=True),
    replace(
        PLAIN,
        step=2,
        loss=None,
        stepped=False,
        why="scaler",
        norms=(("body", None), ("head, two", 1.0)),
        nonfinite=3,
        scale=65536.0,
        scheduled=False,
        notes=(SANITISED, 'said "so",\nand more'),
    ),
    replace(PLAIN, step=3, validated=True, validation=0.75, inside=1e-5),
    replace(PLAIN, step=4, validated=True, norms=(*PLAIN.norms, ("late", 3.0))),
    replace(PLAIN, step=5, loss=None, stepped=False, why="raised", norms=(), rates=()),
)


@pytest.fixture
def file(tmp_path):
    """A file that holds the steps."""
    path = tmp_path / "figures.csv"
    with Journal(path) as log:
        for step in STEPS:
            log(step)
    return path


# -- the file --------------------------------------------------------------------------------------


def test_there_and_back(file):
    """Every step as it was, also what the head lacks; a line each, and NaN nowhere."""
    record = read(file)
    assert record.figures == STEPS
    assert (record.unit, record.notes) == ("step", ())
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") == len(STEPS) + 2
    assert not re.search(r"(?i)[,:\s]-?(nan|inf(inity)?)\b", text)


def test_nonfinite_numbers_are_not_written(tmp_path):
    """Even where a writer of figures forgot that None stands for them."""
    path = tmp_path / "f.csv"
    with Journal(path) as log:
        log(replace(PLAIN, loss=math.nan, norms=(("body", math.inf),), scale=math.inf))
    (back,) = read(path).figures
    assert (back.loss, back.norms, back.scale) == (None, (("body", None),), None)
    assert not re.search(r"(?i)[,:\s]-?(nan|inf(inity)?)\b", path.read_text(encoding="utf-8"))


def test_pandas_reads_it(file):
    """One option, and counts for what is missing."""
    table = pd.read_csv(file, comment="#")
    assert list(table["loss_nonfinite"]) == [0, 0, 1, 0, 0, 0]
    assert table["nonfinite:body"].sum() == 1
    assert table["loss"].isna().sum() == 2


def test_each_step_is_there_at_once(tmp_path):
    """Another process sees a step before the next one."""
    path = tmp_path / "f.csv"
    log = Journal(path)
    for i, step in enumerate(STEPS, start=1):
        log(step)
        assert len(read(path).figures) == i
    log.close()
    log(PLAIN)  # ignored
    assert len(read(path).figures) == len(STEPS)


def test_a_torn_line_is_left_out_and_said(file):
    """Cut anywhere: whole lines count, the rest is said; never another number."""
    whole = file.read_bytes()
    head = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for end in range(head + 1, len(whole)):
        file.write_bytes(whole[:end])
        lines = whole[head:end].count(b"\n")
        if lines == 0:
            with pytest.raises(StoreError, match="no whole line after the head"):
                read(file)
            continue
        record = read(file)
        assert record.figures == STEPS[:lines]
        torn = "the last line is torn and was left out"
        assert record.notes == (() if whole[end - 1 : end] == b"\n" else (torn,))


def test_a_run_goes_on_behind_the_last_whole_line(file):
    """Also where the last line was torn, or the head already."""
    whole = file.read_bytes()
    for end in range(len(whole) + 1):
        file.write_bytes(whole[:end])
        with Journal(file) as log:
            log(replace(PLAIN, step=9))
        assert read(file).figures[-1] == replace(PLAIN, step=9)


def test_a_foreign_file_is_left_alone(tmp_path):
    """It is refused before a byte of it is touched."""
    path = tmp_path / "notes.csv"
    path.write_text("mine, and no line end", encoding="utf-8")
    with pytest.raises(StoreError, match=r"no figures of nanhunt's; name a new file"):
        Journal(path)
    assert path.read_text(encoding="utf-8") == "mine, and no line end"
    with pytest.raises(StoreError, match=r"cannot be written \(no such file or directory\)"):
        Journal(tmp_path / "gone" / "f.csv")


def test_a_full_disk_does_not_hurt_the_training(tmp_path):
    """One warning, then silence."""

    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(28, "No space left on device")

    log = Journal(tmp_path / "f.csv")
    log._file.close()
    log._file = Full()
    with pytest.warns(RuntimeWarning, match=r"No space left on device\); training goes on without"):
        log(PLAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log(PLAIN)
        log.close()


def test_killed_while_it_writes(tmp_path):
    """A process that is killed leaves a file that is read."""
    code = (
        "import sys\n"
        "from nanhunt.report.health import Journal\n"
        "from nanhunt.records import Figures\n"
        "log = Journal(sys.argv[1]); print('on', flush=True)\n"
        "for i in range(10**9): log(Figures(i, 1.0 / (i + 1), True, '', (('a', 1.0),), 0))\n"
    )
    path = tmp_path / "f.csv"
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE
        ) as child:
            child.stdout.readline()
            size = path.stat().st_size
            while path.stat().st_size < size + 20_000:
                assert child.poll() is None
            child.kill()
        assert all(f.loss == 1.0 / (f.step + 1) for f in read(path).figures)
    assert read(path).notes[-1] == "the count of steps goes back 2 times: the run was started again"


REFUSED = [
    ("", "the file is empty; give one that holds steps"),
    (
        "a,b\n1,2\n",
        "no columns of a step and its loss (step, global_step, iteration, iter, ",
    ),
    ("# nanhunt figures, schema 2\nstep\n", "schema 2 of figures; this nanhunt reads schema 1"),
    ("# nanhunt figures, schema 1\nstep,loss\n0,1\n", "the columns loss_nonfinite, stepped, why"),
    ("step,loss\n", "no whole line after the head; nothing was logged yet"),
    ("step,loss\n0,much\n", "line 2: loss: 'much' is no number"),
    ("step,loss\n0.5,1\n", "line 2: step: '0.5' is no whole number"),
    ('step,loss\n0,"1\n', "no CSV in UTF-8 ("),
    ("step,loss\n0,\xff\n", "no CSV in UTF-8 ("),
    ("\x00\x01\x02", "no columns of a step and its loss"),
]


@pytest.mark.parametrize(("text", "sentence"), REFUSED)
def test_what_is_refused(tmp_path, text, sentence):
    """One sentence that begins with the name of the file."""
    path = tmp_path / "f.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(StoreError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: {sentence}")
    assert "\n" not in str(error.value)


def test_columns_that_were_found_are_named(tmp_path):
    """The first dozen, on one line."""
    path = tmp_path / "f.csv"
    path.write_text("time,\x1b[31m,accuracy\n", encoding="utf-8")
    with pytest.raises(StoreError, match=r"; found time, \\x1b\[31m, accuracy$"):
        read(path)


def outcome(file):
    """What comes of reading a file: "read", or the sentence with which it is refused."""
    try:
        check(read(file).figures)
    except StoreError as error:
        return str(error)
    return "read"


def test_damaged_files_are_refused_or_read(file):
    """Whatever happened to a file: a sentence, or steps."""
    rng = random.Random(5)  # noqa: S311
    whole = file.read_bytes()
    outcomes = []
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(data))
            data[place : place + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
        file.write_bytes(data)
        outcomes.append(outcome(file))
    assert outcomes.count("read") > 10
    assert outcomes.count("read") < 490
    assert not any("\n" in each for each in outcomes)


# -- files of other loggers ------------------------------------------------------------------------


def test_metrics_of_ris_model(tmp_path):
    """A row per epoch, as the training of the RIS model writes it; NaN where no step was made."""
    table = Table(tmp_path / "metrics.csv", step=0)
    for number, loss in enumerate((2.0, math.nan, 1.5), start=1):
        table.note(
            Epoch(
                number, 3, "a", 10 * number, 9, loss, 1.0 if number < 3 else math.nan, {"gap": 0.1},
                0.5, (1e-3,), 0, 512.0, 2.0,
            )
        )  # fmt: skip
    record = read(tmp_path / "metrics.csv")
    assert record.unit == "epoch"
    assert record.notes == ("the file is another logger's: a row is an epoch",)
    assert [f.step for f in record.figures] == [1, 2, 3]
    assert [f.loss for f in record.figures] == [2.0, None, 1.5]
    assert [f.validation for f in record.figures] == [1.0, 1.0, None]
    assert {f.scale for f in record.figures} == {512.0}
    found = [symptom.slug for symptom in check(record.figures).symptoms]
    assert found == ["nonfinite_loss", "nonfinite_validation"]


def test_sparse_rows(tmp_path):
    """As Lightning's CSVLogger writes them: validation in rows of its own."""
    path = tmp_path / "metrics.csv"
    path.write_text(
        "epoch,lr-Adam,step,train_loss,val_loss\n0,,49,2.5,\n0,,49,,2.0\n1,,99,1.5,\n1,,99,,nan\n",
        encoding="utf-8",
    )
    figures = read(path).figures
    assert [(f.loss, f.validated, f.validation) for f in figures] == [
        (2.5, True, 2.0),
        (1.5, True, None),
    ]


# -- frames and scalars ----------------------------------------------------------------------------


def test_frame():
    """One row per step; counts in place of what is not finite, and no empty column."""
    table = frame(STEPS)
    assert list(table.index) == [0, 1, 2, 3, 4, 5]
    assert table.index.name == "step"
    assert table["loss"].isna().sum() == 2
    assert table["loss_nonfinite"].sum() == 1
    assert table["norm:late"].count() == 1
    assert table["stepped"].sum() == 4
    assert table["rate:1"].max() == 1e-4
    assert "update:head, two" not in table
    assert "<table" in table._repr_html_()
    assert frame([]).empty


class Board:
    """What TensorBoard's writer does, kept."""

    def __init__(self):
        self.seen = {}

    def add_scalar(self, tag, scalar_value, global_step):
        """Keep it."""
        self.seen[tag, global_step] = scalar_value


def test_scalars():
    """Every number by its name; what is not finite is counted, and never handed on."""
    board = Board()
    log = Scalars(board)
    for step in STEPS:
        log(step)
    assert board.seen["nanhunt/norm/body", 0] == 0.1 + 0.2
    assert board.seen["nanhunt/loss_nonfinite", 2] == 1.0
    assert ("nanhunt/loss", 2) not in board.seen
    assert all(math.isfinite(value) for value in board.seen.values())
    assert numbers(STEPS[2])["nonfinite:body"] == 1.0
    assert "loss" not in numbers(STEPS[2])


def test_tensorboard_itself(tmp_path):
    """The real writer takes them."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        open_log(writer)(PLAIN)
    assert any(path.stat().st_size > 100 for path in tmp_path.iterdir())


def test_open_log(tmp_path):
    """A name, a board or a function; all else is refused."""
    kept = []
    assert open_log(kept.append) == kept.append
    log = open_log(tmp_path / "f.csv")
    log(PLAIN)
    log.close()
    assert read(tmp_path / "f.csv").figures == (PLAIN,)
    with pytest.raises(UsageError, match=r"or a function of Figures; got 3$"):
        open_log(3)


# -- the page --------------------------------------------------------------------------------------


def shown(figures, width=80, **options):
    """The page as text."""
    console = Console(width=width, file=io.StringIO(), **options)
    console.print(render(figures, title="f.csv"))
    return console.file.getvalue()


def course(n=200, **changes):
    """A run that falls, with some steps changed."""
    return [replace(PLAIN, step=i, loss=2.0 * 0.99**i, **changes) for i in range(n)]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_nothing_is_wider_than_the_page(width):
    """Neither tables nor sentences, whatever is in them."""
    nasty = "[red]x[/red]\x1b[31m\r\nnext\u202e" + "very_long_name." * 12
    figures = [replace(f, norms=((nasty, None),), nonfinite=1) for f in course()]
    for run in (figures, course(), STEPS, []):
        text = shown(run, width)
        assert all(len(line) <= width for line in text.splitlines())
        assert "\x1b" not in text


def test_page_of_a_healthy_run():
    """The verdict, the courses and what could not be judged."""
    text = shown(course(norms=(("body", 1.0),)))
    lines = text.splitlines()
    assert lines[0] == "nanhunt health · f.csv · 200 steps, 200 made · last step 199"
    assert lines[2] == " NO SYMPTOM  0 of 19 rules apply; 3 cannot be judged"
    assert "loss       ██▇▆▆▅▅▄▄▄▃▃▃▂▂▂▂▁▁▁▁▁▁▁  2" in text
    assert "updates were measured in 0 steps; 5 would do" in text


def test_page_of_a_sick_run():
    """A table of symptoms, then each with what was measured and what to do."""
    text = shown([*course(100), replace(PLAIN, step=100, loss=None, stepped=False, why="loss")])
    assert " SYMPTOM  1 of 19 rules apply; " in text
    assert "\n nonfinite_loss  100    The loss is not finite\n" in text
    assert "\n measured  in 1 of 101 steps\n" in text
    assert "\n to do     `nanhunt replay` of that step names" in text
    assert "not finite" in text


def test_no_steps():
    """Nothing is claimed of nothing."""
    text = shown([])
    assert " CANNOT TELL  0 of 19 rules apply; 19 cannot be judged" in text


@pytest.mark.parametrize("how", ["no colour", "ascii"])
def test_courses_in_ascii(how, monkeypatch):
    """With NO_COLOR, and where the console cannot show blocks."""
    if how == "no colour":
        monkeypatch.setenv("NO_COLOR", "1")
        text = shown(course())
    else:
        raw = io.BytesIO()
        console = Console(width=80, file=io.TextIOWrapper(raw, "ascii", errors="replace"))
        console.print(render(course()))
        console.file.flush()
        text = raw.getvalue().decode()
    assert "@@#**++===---...._______" in text
    assert not set(text) & set("▁▂▃▄▅▆▇█")


def test_notebook():
    """A page shows itself where Jupyter asks."""
    bundle = render(course())._repr_mimebundle_((), ())
    assert "NO SYMPTOM" in bundle["text/plain"]
    assert "<pre" in bundle["text/html"]


@pytest.mark.parametrize(
    ("values", "width", "drawn"),
    [
        ([], 8, ""),
        ([1.0], 8, "▅"),
        ([1.0, 2.0], 8, "▁█"),
        ([1.0, None, 3.0], 8, "▁x█"),
        ([None, None], 8, "xx"),
        ([1.0, 10.0, 100.0, 1000.0], 8, "▁▃▆█"),
        ([-1.0, 0.0, 1.0], 8, "▁▅█"),
        (list(range(80)), 8, "▁▂▃▄▅▆▇█"),
        ([5e-324, 1e308], 8, "▁█"),
    ],
)
def test_sparks(values, width, drawn):
    """Low to high; logarithms where only digits compare; what is lost stays visible."""
    assert draw(values, width) == drawn
    assert len(draw(values, width, blocks=False)) == len(drawn)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs the command line: exit code, stdout, stderr."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["nanhunt", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code, *capsys.readouterr()

    return call


def test_command(run, file, tmp_path):
    """A page and exit code 0; 1 where that was asked for; the findings as JSON."""
    code, out, err = run("health", file, "--json", tmp_path / "h.json")
    assert (code, err) == (0, "")
    assert "SYMPTOMS  " in out
    body = json.loads((tmp_path / "h.json").read_text(encoding="utf-8"))
    assert (body["schema"], body["steps"], body["made"], body["unit"]) == (1, 6, 4, "step")
    slugs = [symptom["slug"] for symptom in body["symptoms"]]
    assert slugs == ["nonfinite_loss", "nonfinite_validation", "sanitised_gradients"]
    assert body["symptoms"][0]["first"] == 2
    everything = [*slugs, *(each["slug"] for each in body["cannot_tell"]), *body["not_found"]]
    assert sorted(everything) == sorted(rule.slug for rule in RULES)
    assert run("health", file, "--exit-code")[0] == 1
    code, out, err = run("health", file, "--json", "-")
    assert (code, json.loads(out)) == (0, body)


def test_a_healthy_run_leaves_with_0(run, tmp_path):
    """Also where an exit code was asked for; the torn line is said."""
    path = tmp_path / "f.csv"
    with Journal(path) as log:
        for step in course(3):
            log(step)
    path.write_bytes(path.read_bytes() + b"3,0.")
    code, out, err = run("health", path, "--exit-code")
    assert (code, err) == (0, "")
    assert "the last line is torn and was left out" in out


def test_command_refuses(run, tmp_path):
    """One sentence and exit code 2."""
    gone = tmp_path / "gone.csv"
    sentence = f"nanhunt: {gone}: cannot be read (no such file or directory); give a CSV file"
    code, out, err = run("health", gone)
    assert (code, out) == (2, "")
    assert err.startswith(sentence)
    code, out, err = run("health", tmp_path)
    assert (code, out) == (2, "")
    assert err == f"nanhunt: {tmp_path}: it is a folder; give the CSV file in it\n"
    assert run("health", gone, "--json", tmp_path / "no" / "h.json")[0] == 2


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.slug)
def test_explain(run, rule):
    """What a symptom means, when it applies and what to do."""
    code, out, err = run("explain", rule.slug)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[:3] == [f"{rule.slug}: {rule.title}", rule.when, f"to do: {rule.advice}"]
    assert lines[3:] == ([f"also known as: {rule.known_as}"] if rule.known_as else [])


def test_explain_a_slip(run):
    """The nearest symptom is offered."""
    assert "did you mean loss_spikes? " in run("explain", "loss_spike")[2]


def test_torch_is_not_needed(file):
    """Showing a file loads neither torch nor pandas."""
    code = (
        "import sys; sys.argv = ['nanhunt', 'health', sys.argv[1]]\n"
        "from nanhunt import cli\n"
        "try: cli.main()\n"
        "except SystemExit: print([n for n in ('torch', 'pandas') if n in sys.modules])\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False
    )
    assert ran.stdout.splitlines()[-1] == "[]"
