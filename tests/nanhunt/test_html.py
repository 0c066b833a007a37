"""A report as a page: what stands in it, that nothing in it is obeyed, also by a browser."""

import contextlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nanhunt import store
from nanhunt.errors import StoreError
from nanhunt.records import Answer, ModuleFacts, Pace, Trial
from nanhunt.report import html, verdict
from nanhunt.report.html.heat import heat_map
from nanhunt.report.html.sizes import compare_modules

ROOT = Path(__file__).parents[2]
CLOSED = {"verdict", "phase", "mode", "answer", "variant"}  # fields with a fixed set of words
NASTY = (
    "<script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=1">',
    "]]></style></svg><script>document.title='owned'</script><!--",
    "javascript:document.title='owned'",
    "{{ 7 * 7 }}{% raw %}$\\frac{1}{2}$",
    "\u202egnp.exe\x00\x1b[31m\ud800\n日本",
)
VOID = {"meta", "br", "path", "use", "rect", "circle", "line"}


class Page(HTMLParser):
    """The elements of a page, its texts, and whether every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def full_report(incident_report):
    """A culprit with everything that a report can hold."""
    fix = Trial(
        "gap_only_projector", "linalg_eigh: call → gap_only(x, call)", finite=True,
        sites=("ris_model/losses.py:214",), times=1, before="u = eigh(loaded)",
        after="u = gap_only(loaded, eigh(loaded))", loss=4.912, loss_change=0.0, gradient=16.3,
        gradient_error=3e-5, reference="fp64",
    )  # fmt: skip
    return replace(
        incident_report,
        command="nanhunt replay --batch 0",
        trials=(Trial("neutralise", "repaired", finite=True), fix, Trial("more_loading", "x → y")),
        diagnosis=(
            Answer("inputs_finite", "inputs finite?", "yes", "12 tensors"),
            Answer("other_seeds", "the same from other seeds?", "cannot tell", "not replayed"),
        ),
        modules=(
            ModuleFacts("(model)", largest=1.2, rms=0.2, gradient=math.nan, nonfinite_gradient=9),
            ModuleFacts("head", (("float32", 3),), (("float16", 2),), 0.0, 0.0, 1e-300),
            ModuleFacts("other"),
        ),
        pace=(Pace(0, 3.0, 2.0, 1.0), Pace(1, math.nan, math.inf, 0.0)),
        harmless=("masked_fill at terms.py:176",),
    )


def poisoned(value, word, name=""):
    """The same record with `word` for every text in it."""
    if is_dataclass(value):
        return replace(
            value,
            **{f.name: poisoned(getattr(value, f.name), word, f.name) for f in fields(value)},
        )
    if isinstance(value, tuple):
        return tuple(poisoned(each, word, name) for each in value)
    return word if isinstance(value, str) and name not in CLOSED else value


def test_page_is_well_formed_and_alone(any_report):
    """Every element is closed, nothing is loaded or run, and there is nothing to click away to."""
    page = Page(html.render(any_report))
    assert page.open == []
    assert not {"script", "img", "link", "iframe", "object", "embed", "a", "form", "base"} & {
        *page.tags
    }
    assert not [n for n, _ in page.attributes if n.startswith("on") or n in ("href", "src")]
    assert all(v.startswith("#") for n, v in page.attributes if n.endswith(":href"))
    policy = dict(page.attributes)["content"]
    assert page.attributes.count(("http-equiv", "Content-Security-Policy")) == 1
    assert policy


def test_policy_forbids_all_but_styles(any_report):
    """The policy of the page stands before anything that it could forbid."""
    text = html.render(any_report)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.group(1).startswith("default-src 'none'; style-src 'unsafe-inline'; base-uri")
    assert policy.start() < text.index("<title>") < text.index("<style>")


def test_page_says_what_the_report_says(any_report):
    """The verdict, each culprit, and what was not checked stand in the page."""
    text = Page(html.render(any_report)).text
    flat = lambda words: " ".join(html.page.safe(words).split())
    title = verdict.title(any_report)
    assert f"{title.word} {flat(title.sentence)}" in text
    for finding in any_report.culprits:
        assert flat(verdict.spot(finding)) in text
        assert all(flat(words) in text for words in finding.evidence)
    assert all(flat(words) in text for words in any_report.not_checked)


def test_every_part_is_there(full_report):
    """Fix, way, heat map, steps, tables, modules, diagnosis, notes and the command."""
    page = Page(html.render(full_report))
    for words in (
        "sole cause yes: repaired at birth", "gap_only_projector proven : finite, loss as before",
        "@@ ris_model/losses.py:214 @@", "gradient error to fp64 3e-05 (a proof allows 0.01)",
        "refuted : more_loading", "The way of the poison", "covariance.py:88", "58 of 79 poisoned",
        "Variants × ablations", "Steps", "Runs", "Ablations", "Trials", "Modules", "Diagnosis",
        "cannot tell not replayed", "Notes", "masked_fill at terms.py:176", "Not checked",
        "again: nanhunt replay --batch 0",
    ):  # fmt: skip
        assert words in page.text, words
    assert page.tags.count("svg") == 3


def test_healthy_page_is_short(healthy_report):
    """A healthy step has neither a cure nor a way."""
    text = Page(html.render(healthy_report)).text
    assert "The way of the poison" not in text
    assert "Cure" not in text
    assert "ran native" in text


@pytest.mark.parametrize("word", NASTY)
def test_hostile_words_stay_words(full_report, word):
    """Whatever a name holds, it adds no element, no attribute and nothing that a template obeys."""
    plain, page = Page(html.render(full_report)), Page(html.render(poisoned(full_report, word)))
    assert page.open == []
    assert {*page.tags} <= {*plain.tags} | {"mark", "span", "td"}
    assert {n for n, _ in page.attributes} <= {n for n, _ in plain.attributes}
    assert html.page.safe(word)[:20].strip() in page.text


def test_colours_in_names_stay(full_report):
    """A name that looks like a colour of the drawings is not taken for one."""
    assert "#1b2330" in Page(html.render(poisoned(full_report, "#1b2330"))).text


def test_same_report_same_page(full_report):
    """Nothing in the page depends on the time or on chance."""
    assert html.render(full_report) == html.render(full_report)


def test_ids_are_unique(full_report):
    """The drawings of one page do not share the names of their parts."""
    two = replace(full_report, culprits=full_report.culprits * 2)
    names = [v for n, v in Page(html.render(two)).attributes if n == "id"]
    shapes = [name for name in names if re.match(r"[mp][0-9a-f]{10}$", name)]
    assert shapes
    assert len(shapes) == len({*shapes})


def test_size_of_a_large_report(full_report):
    """Thousands of modules stay a page that can be sent."""
    rows = tuple(
        ModuleFacts(f"blocks.{i}.mlp.{k}", (("float32", 9),), (("float32", 9),), 1.0, 0.5, 2.0)
        for i in range(500)
        for k in range(10)
    )
    text = html.render(replace(full_report, modules=rows))
    assert len(text.encode()) < 2_000_000
    assert "the first 2000 modules" in Page(text).text


def test_long_way_is_cut_and_listed(full_report):
    """The drawing counts the middle of a long way; the list below it has every step."""
    step = full_report.culprits[0].path[-1]
    path = tuple(replace(step, module=f"layer.{i}") for i in range(40))
    finding = replace(full_report.culprits[0], path=path)
    text = Page(html.render(replace(full_report, culprits=(finding,)))).text
    assert "… 26 more stations …" in text
    assert all(f"in layer.{i} " in text for i in range(40))


def test_code_is_shown_where_it_still_reads_so(full_report, tmp_path, monkeypatch):
    """The lines around the culprit come from the file only while its line is the reported one."""
    monkeypatch.chdir(tmp_path)
    lines = [f"x{i} = {i}" for i in range(30)]
    Path("step.py").write_text("\n".join(lines), encoding="utf-8")
    finding = replace(full_report.culprits[0], file="step.py", line=20, source="x19 = 19")
    page = Page(html.render(replace(full_report, culprits=(finding,))))
    assert "x13 = 13" in page.text
    assert "x12 = 12" not in page.text
    changed = replace(finding, source="x19 = 18")
    assert "x13" not in html.render(replace(full_report, culprits=(changed,)))


def test_only_python_is_read(full_report, tmp_path, monkeypatch):
    """A report from elsewhere cannot make the page show another kind of file."""
    monkeypatch.chdir(tmp_path)
    Path("secrets.txt").write_text("user\ntoken\n", encoding="utf-8")
    finding = replace(full_report.culprits[0], file="secrets.txt", line=1, source="user")
    assert "token" not in html.render(replace(full_report, culprits=(finding,)))


def test_heat_map_has_every_replay(unexplained_report, incident_report):
    """Each variant and ablation has its field; what was not run says so."""
    found = heat_map(unexplained_report)
    assert found.heads == ("as given", "− aux", "− mixup, cutmix", "− kl")
    assert [field.kind for field in found.rows[0][1]] == [*["nonfinite"] * 3, "raised"]
    kinds = {field.kind for _, row in heat_map(incident_report).rows for field in row}
    assert kinds == {"nonfinite", "finite", "missing", "raised"}


@pytest.fixture
def compared_report(full_report):
    """A report whose variant in half precision overflows in one module and shrinks in another."""
    rows = (
        ModuleFacts("(model)", largest=1.25, gradient=math.nan, nonfinite_gradient=9),
        ModuleFacts("head", largest=65504.0, nonfinite_out=2, gradient=1e-7),
        ModuleFacts("other", (("float16", 7),), largest=3.0),
    )
    native = replace(full_report.modules[1], largest=9.0, gradient=1e-3)
    facts = (full_report.modules[0], native, full_report.modules[2])
    half = replace(full_report.runs[-1], variant="amp-fp16", ablated=(), modules=rows)
    return replace(full_report, modules=facts, runs=(*full_report.runs, half))


def test_modules_beside_the_variants(compared_report):
    """Sizes that are not finite, or far from the native ones, are marked; what is absent is not."""
    found = compare_modules(compared_report)
    assert found.variants == ("native", "amp-fp16")
    marks = {name: [size for row in both for size in row] for name, *both in found.rows}
    assert marks["(model)"] == [("1.2", ""), ("1.25", ""), ("nan", "bad"), ("nan", "bad")]
    assert marks["head"][:2] == [("9", ""), ("6.55e+04 ✕", "bad")]
    assert [size.shade for size in marks["head"][2:]] == ["", "odd"]
    assert marks["other"] == [("–", ""), ("3", ""), ("–", ""), ("–", "")]
    page = Page(html.render(compared_report)).text
    assert "Modules × variants" in page
    assert "Dtypes under amp-fp16" in page
    assert "7 f16" in page


def test_deep_modules_are_left_out_of_the_comparison(compared_report):
    """Of many modules the outer ones are compared, and the page says how many are left out."""
    deep = tuple(ModuleFacts(f"blocks.{i}.mlp", largest=1.0) for i in range(300))
    outer = tuple(ModuleFacts(f"blocks.{i}", largest=1.0) for i in range(50))
    report = replace(compared_report, modules=(ModuleFacts("(model)"), *outer, *deep))
    assert compare_modules(report).left_out == 300
    assert "300 inner modules are left out" in Page(html.render(report)).text


def test_one_replay_is_no_map(healthy_report):
    """A single replay has nothing to be set beside."""
    assert heat_map(replace(healthy_report, runs=healthy_report.runs[:1], ablations=())) is None


def test_without_matplotlib(full_report, monkeypatch):
    """Without the library that draws, the page has its tables and says what is missing."""
    monkeypatch.setattr(html.page, "_can_draw", lambda: False)
    page = Page(html.render(full_report))
    assert "svg" not in page.tags
    assert "nanhunt[html]" in page.text
    assert "AddmmBackward0 in network.factor_head.1" in page.text


def test_damaged_reports_render(full_report, damage):
    """Whatever can be read can be told as a page."""
    rng = random.Random(11)  # noqa: S311
    text = store.dump(full_report)
    for _ in range(60):
        with contextlib.suppress(StoreError):
            report = store.parse(json.dumps(damage(json.loads(text), rng)))
            assert Page(html.render(report)).open == []


def test_frame_runs_nothing(full_report):
    """Inside another page the report stands in a frame that may do nothing."""
    page = Page(html.embed(poisoned(full_report, NASTY[1])))
    assert page.tags == ["iframe"]
    assert dict(page.attributes)["sandbox"] == ""
    assert dict(page.attributes)["srcdoc"] == html.render(poisoned(full_report, NASTY[1]))


def test_notebook_shows_the_report(full_report, ran):
    """Where IPython runs, importing nanhunt is enough: the page, and the short report as text."""
    pytest.importorskip("IPython", reason="IPython is not installed (extra `test`)")
    code = (
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance(history_length=0)\n"
        "shell.display_formatter.active_types = ['text/plain', 'text/html']\n"
        "import sys, nanhunt\n"
        "told, _ = shell.display_formatter.format(nanhunt.load(sys.argv[1]))\n"
        "assert told['text/html'].startswith('<iframe sandbox=\"\" srcdoc=')\n"
        "print(told['text/plain'])\n"
        "assert 'torch' not in sys.modules\n"
    )
    assert ran(code, full_report).startswith(full_report.headline)


def test_page_needs_no_torch(full_report, ran):
    """A saved report becomes a page without torch."""
    code = (
        "import sys; from nanhunt import store; from nanhunt.report import writer\n"
        "report = store.load(sys.argv[1])\n"
        "[writer(form)(report) for form in ('html', 'markdown')]\n"
        "assert 'torch' not in sys.modules\n"
    )
    ran(code, full_report)


@pytest.fixture
def ran(tmp_path):
    """Runs code on a saved report in a fresh Python, which is to succeed."""

    def run(code, report):
        store.save(report, tmp_path / "report.json")
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "report.json"],
            cwd=ROOT,
            # IPython warns of a virtual environment that is active and not the one it runs in.
            env={
                **{name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"},
                "PYTHONIOENCODING": "utf-8",
                "IPYTHONDIR": str(tmp_path),
            },
            capture_output=True,
            check=False,
            encoding="utf-8",
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return run


# --- in a real browser ---------------------------------------------------------------------------

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture
def browse(tmp_path):
    """Opens a page in headless Chromium: what its console says, and the page as it then is."""
    if BROWSER is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")

    def opened(text):
        (tmp_path / "page.html").write_text(text, encoding="utf-8")
        done = subprocess.run(
            [
                BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                "--disable-quic", "--no-first-run", "--disable-background-networking",
                "--disable-component-update", "--disable-sync",
                f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0",
                "--dump-dom", (tmp_path / "page.html").as_uri(),
            ],
            capture_output=True, check=True, encoding="utf-8", timeout=120,
        )  # fmt: skip
        said = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        return said, Page(done.stdout)

    return opened


def test_browser_would_tell(browse):
    """The browser is asked rightly: it reports a script that the policy of the page stops."""
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
    said, _ = browse(f"<!doctype html>{policy}<script>document.title = 1</script>")
    assert "Content Security Policy" in said[0]


def test_browser_has_nothing_to_say(browse, full_report):
    """No error, no warning; what the browser made of the page is the page."""
    text = html.render(full_report)
    said, page = browse(text)
    assert said == []
    assert page.tags.count("svg") == Page(text).tags.count("svg")


def test_browser_obeys_no_name(browse, full_report):
    """With every hostile word everywhere the title is ours, and nothing was tried."""
    for word in NASTY[:3]:
        said, page = browse(html.render(poisoned(full_report, word)))
        assert said == []
        assert not {"script", "img"} & {*page.tags}
        assert html.page.safe(word)[:20] in page.text
