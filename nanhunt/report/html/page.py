"""The page: what the template needs, put together from the words and tables of the other forms."""

import html
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.text import Text

from nanhunt.places import code_of
from nanhunt.records import Finding, ModuleFacts, Report, Trial
from nanhunt.report import tables, trials, verdict
from nanhunt.report.html.heat import heat_map
from nanhunt.report.html.markup import change, code, marked, safe
from nanhunt.report.html.sizes import compare_modules
from nanhunt.report.layout import Grid, Sheet, number, short
from nanhunt.report.modules import module_table, short_dtype
from nanhunt.report.repro import sentence

REACH = 6  # lines of code shown above and below the culprit's
MODULES = 2000  # rows of the table of modules
FLOWS = 200  # rows of the table of each other variant
WIDE = 100_000  # letters: nothing is left out of a table for want of room
_NO_DRAWINGS = "drawings: they need matplotlib (pip install 'nanhunt[html]')"


def render(report: Report) -> str:
    """The whole page; the same report always gives the same one."""
    page = _environment().get_template("page.html.jinja")
    return page.render(
        report=report,
        title=verdict.title(report),
        subject=verdict.subject(report),
        findings=[_told(report, finding, i) for i, finding in enumerate(report.culprits)],
        risks=[*map(marked, verdict.risks(report))],
        unplaced=[] if report.culprits else [*map(marked, verdict.unplaced(report))],
        fix=_fix(report),
        cures=[
            (name, marked(text)) for name, text in map(verdict.removal, verdict.removals(report))
        ],
        cure_unsought=verdict.NO_CURE_SOUGHT if verdict.is_cure_unsought(report) else "",
        advice=verdict.advice(report),
        repro=sentence(report),
        heat=heat_map(report),
        tables=_tables(report),
        modules=_modules(report.modules),
        flows=[(run.variant, _modules(run.modules[:FLOWS])) for run in report.runs if run.modules],
        compared=compare_modules(report),
        drawings=_drawings(report),
        facts=verdict.facts(report),
        replays=verdict.replays(report),
        not_checked=[*report.not_checked, *([] if _can_draw() else [_NO_DRAWINGS])],
        command=report.command,
    )


def embed(report: Report) -> str:
    """The page in a frame of its own, which may run nothing and changes nothing around it."""
    frame = '<iframe sandbox="" srcdoc="{}" style="{}"></iframe>'
    style = "width:100%;height:42rem;border:1px solid #8886;border-radius:8px"
    return frame.format(html.escape(render(report), quote=True), style)


@cache
def _environment() -> Environment:
    """The templates; every value is escaped, and none may be missing."""
    found = Environment(
        loader=PackageLoader("nanhunt.report.html"),
        autoescape=True,
        finalize=safe,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(marked=marked, number=number, short=short)
    return found


# --- the verdict ---------------------------------------------------------------------------------


class _Told(NamedTuple):
    """One culprit as the page shows it."""

    finding: Finding
    place: Markup
    spot: str
    owner: str
    why: str
    cause: str
    source: list[tuple[int, Markup]]
    way: Markup | None
    steps: list[tuple[str, str, str]]
    poisoned: str


def _told(report: Report, finding: Finding, number: int) -> _Told:
    return _Told(
        finding=finding,
        place=marked(verdict.place(finding)),
        spot=verdict.spot(finding),
        owner=verdict.owner(report, finding),
        why=verdict.why(finding),
        cause=verdict.cause(finding),
        source=_source(finding),
        way=_way(finding, number),
        steps=[*_steps(finding)],
        poisoned=" · ".join(verdict.poisoned(finding)),
    )


def _source(finding: Finding) -> list[tuple[int, Markup]]:
    """The numbered lines around the culprit's; the whole file tells what is code and what text."""
    lines = code(code_of(finding))
    first = max((finding.line or 0) - REACH, 1)
    return [*enumerate(lines[first - 1 : (finding.line or 0) + REACH], start=first)]


def _steps(finding: Finding) -> Iterator[tuple[str, str, str]]:
    """Every step of the way: module, node or op, line of code."""
    for step in finding.path:
        frame = step.frame
        spot = f"{frame.file}:{frame.line} in {frame.function}" if frame else ""
        yield step.module, step.node or short(step.op), spot


class _Fix(NamedTuple):
    """The fix beside the verdict: its proof, the line before and after, and its figures."""

    is_proven: bool
    sole: list[str]
    told: Markup
    lines: tuple[Markup, Markup] | None
    words: str
    sites: str
    figures: list[tuple[str, str]]
    refuted: Markup


def _fix(report: Report) -> _Fix | None:
    """What the trials showed; None where there were none."""
    if not report.trials:
        return None
    found = trials.best(report)
    lines = None
    if found is not None and found.before is not None and found.after is not None:
        lines = change(found.before, found.after)
    return _Fix(
        is_proven=found is not None and found.is_proven,
        sole=trials.sole_cause(report),
        told=marked(trials.fix(report)),
        lines=lines,
        words=trials.in_words(found) if found is not None and lines is None else "",
        sites=", ".join(dict.fromkeys(found.sites)) if found is not None else "",
        figures=[*_figures(found)] if found is not None else [],
        refuted=marked(trials.refuted(report)),
    )


def _figures(trial: Trial) -> Iterator[tuple[str, str]]:
    """What was measured with the change, beside what a proof allows."""
    yield "loss", number(trial.loss)
    if trial.loss_change is not None:
        yield "loss changed by", _bounded(trial.loss_change, trial.loss_tolerance)
    yield "‖g‖", number(trial.gradient)
    if trial.gradient_error is not None:
        told = _bounded(trial.gradient_error, trial.gradient_tolerance)
        yield f"gradient error to {trial.reference}", told
    yield "changed calls ran", f"{trial.times} ×"
    yield "replay took", f"{number(trial.seconds)} s"


def _bounded(value: float, bound: float) -> str:
    return f"{number(value)} (a proof allows {number(bound)})"


# --- tables and drawings -------------------------------------------------------------------------


class _Table(NamedTuple):
    """A table as the page shows it; a row with one cell only spans the table."""

    heads: list[str]
    rows: list[list[Markup]]
    below: list[Markup]


def _table(grid: Grid) -> _Table | None:
    """The grid with all of its columns; None where it is empty."""
    if not grid.columns and not grid.below:
        return None
    count = len(grid.columns[0].cells) if grid.columns else 0
    rows: list[list[Text]] = [[column.cells[i] for column in grid.columns] for i in range(count)]
    for i, span in grid.spans.items():
        rows[i][1:] = [span]
    heads = [column.head for column in grid.columns]
    return _Table(heads, [[*map(marked, row)] for row in rows], [*map(marked, grid.below)])


def _tables(report: Report) -> dict[str, _Table | None]:
    """The tables by what they are called."""
    sheet = Sheet(Console(width=WIDE), WIDE)
    return {
        "Steps": _table(tables.pace(report)),
        "Runs": _table(tables.runs(report, sheet)),
        "Ablations": _table(tables.ablations(report)),
        "Trials": _table(trials.table(report, WIDE)),
    }


class _Module(NamedTuple):
    """One row of the table of modules, and the dtypes of its ops: shown name, class, count."""

    cells: list[Markup]
    forward: list[tuple[str, str, int]]
    backward: list[tuple[str, str, int]]


def _modules(facts: Sequence[ModuleFacts]) -> list[_Module]:
    """The modules in the order in which they come."""
    shown = facts[:MODULES]
    table = _table(module_table(shown))
    rows = table.rows if table is not None else []
    return [
        _Module(cells[:5], _flow(row.forward), _flow(row.backward))
        for cells, row in zip(rows, shown, strict=True)
    ]


def _flow(counts: Sequence[tuple[str, int]]) -> list[tuple[str, str, int]]:
    """The dtypes of a module's ops, each with the class that colours it."""
    return [(short_dtype(dtype), _shade(dtype), count) for dtype, count in counts]


def _shade(dtype: str) -> str:
    """The class of a dtype: by how many digits it has."""
    for name, shade in (
        ("bfloat16", "half"), ("float16", "half"), ("float64", "double"), ("complex128", "double"),
        ("float32", "single"), ("complex64", "single"),
    ):  # fmt: skip
        if dtype == name:
            return shade
    return "other"


@cache
def _can_draw() -> bool:
    return find_spec("matplotlib") is not None


def _way(finding: Finding, number: int) -> Markup | None:
    if not _can_draw():
        return None
    from nanhunt.report.html import drawing

    return drawing.way(finding, f"way-{number}")


def _drawings(report: Report) -> dict[str, Markup | None]:
    """The drawings beside the tables; none without the library that draws them."""
    if not _can_draw():
        return {"modules": None, "pace": None}
    from nanhunt.report.html import drawing

    return {
        "modules": drawing.modules(report.modules, "modules"),
        "pace": drawing.pace(report.pace, "pace"),
    }
