"""The tables for those who doubt: every replay, and every ablation, in one line each."""

import math
from collections.abc import Sequence
from dataclasses import replace

from rich.cells import cell_len
from rich.text import Text

from nanhunt.records import Ablation, Group, Pace, Report, Run
from nanhunt.report.layout import (
    GAP,
    Column,
    Grid,
    Sheet,
    beside,
    clean,
    clipped,
    number,
    said,
    short,
)

GOOD, BAD, ODD, FAINT = "green", "red", "yellow", "dim"
NONE = "–"
ANSWER = 13  # room of an answer
RECENT = 8  # steps shown of many
FEW = 3  # so many groups of parameters are shown without their total, where they fit
_RAISED_DIGITS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_TOOK_EFFECT = {True: ("yes", ""), False: ("NO", BAD), None: ("cannot tell", ODD)}


def runs(report: Report, sheet: Sheet) -> Grid:
    """Variants, each as given and ablated; then what is to be said about single runs and all."""
    grid = _run_table(report.runs, sheet) if report.runs else Grid()
    below = [*grid.below, *([said(report.precision)] if report.precision else [])]
    without = [g for g in report.native.groups if g.without_gradient] if report.native else []
    if without:
        counts = [f"{g.name} {g.without_gradient}/{g.parameters}" for g in without]
        below.append(said("no gradient at all (native): ", ", ".join(counts)))
    return replace(grid, below=below)


def pace(report: Report) -> Grid:
    """The steps before the one that is reported, and that one: the last few in a line each."""
    if not report.pace:
        return Grid()
    rows = report.pace[-RECENT:]
    columns = [
        Column(
            "Steps",
            [said(str(p.step), (f" {_skipped_by(p)}" * p.skipped, FAINT)) for p in rows],
        ),
        Column("loss", [_taken(p, p.loss) for p in rows]),
        Column("‖g‖ total", [_taken(p, p.gradient) for p in rows]),
        Column("largest parameter before", [figure(p.largest) for p in rows], rank=1),
    ]
    taken = f"{len(report.pace)} of {report.steps} steps taken"
    ends = "the last one failed" if report.verdict in ("culprit", "unexplained") else "all finite"
    return Grid(columns, below=[said(f"{taken}; {ends}")])


def ablations(report: Report) -> Grid:
    """What was taken out or left alone, whether that took effect, and what came of it."""
    rows = sorted(report.ablations, key=lambda a: (a.mode == "alone", not a.requested))
    grid = _ablation_table(rows) if rows else Grid()
    below = []
    added = [_label(a) for a in rows if not a.requested]
    if added:
        below.append(said("not requested, added by nanhunt: ", ", ".join(added)))
    weights = dict(report.weights)
    for pair in report.twins:
        first, second = (
            f"{name} ({number(weights[name])})" if name in weights else name for name in pair
        )
        below.append(said(("near twins: ", ODD), f"{first} and {second} are two weights"))
    return replace(grid, below=below)


def diagnosis(report: Report, sheet: Sheet) -> list[Text]:
    """Every question, its answer, and what was measured for it."""
    if not report.diagnosis:
        return []
    asks = min(max(cell_len(a.asks) for a in report.diagnosis), sheet.width // 2) + GAP
    inner = sheet.inside(asks + ANSWER)
    lines = [said(("Diagnosis", "bold"))]
    for each in report.diagnosis:
        label = clipped(said(each.asks), asks - GAP)
        label.pad_right(asks - label.cell_len)
        style = ODD if each.answer == "cannot tell" else ""
        label += said((each.answer, style))
        lines += beside(label, inner.wrapped(said(each.evidence)), asks + ANSWER)
    return lines


def share(groups: Sequence[Group]) -> str:
    """How many gradients are non-finite."""
    return f"{sum(g.nonfinite for g in groups)}/{sum(g.parameters for g in groups)}"


def raised(error: str) -> Text:
    """An error in one line."""
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["(no message)"]
    return said(("raised: ", ODD), lines[0] + (" …" if len(lines) > 1 else ""))


def outcome(ablation: Ablation) -> Text:
    """What the replay showed."""
    if ablation.raised is not None:
        return raised(ablation.raised)
    still = "still " if ablation.mode == "without" else ""
    return said(("finite", GOOD) if ablation.finite else (f"{still}non-finite", BAD))


def figure(value: float) -> Text:
    """A number, coloured where it is non-finite."""
    return said((number(value), "" if math.isfinite(value) else BAD))


def norm(groups: Sequence[Group]) -> Text:
    """The norm of all gradients together."""
    norms = [group.norm for group in groups]
    if not norms:
        return Text(NONE)
    return figure(math.nan if any(map(math.isnan, norms)) else math.hypot(*norms))


def _run_table(all_runs: Sequence[Run], sheet: Sheet) -> Grid:
    """The table and its footnotes."""
    order = list(dict.fromkeys(run.variant for run in all_runs))
    rows = sorted(all_runs, key=lambda r: (order.index(r.variant), bool(r.ablated)))
    marks = _marks(rows)
    names = [said(_name(run), (_mark(run, marks), FAINT)) for run in rows]
    spans = {i: raised(run.raised) for i, run in enumerate(rows) if run.raised is not None}
    below = [said((f"{mark} {words}", FAINT)) for words, mark in marks.items()]
    return Grid(_run_columns(rows, names, sheet), spans, below)


def _skipped_by(step: Pace) -> str:
    return "left out by train_step" if math.isnan(step.loss) else "skipped by the scaler"


def _taken(step: Pace, value: float) -> Text:
    """A figure of a step; one that was left out has none."""
    return said(NONE) if step.skipped and math.isnan(value) else figure(value)


def _name(run: Run) -> str:
    return f"  − {', '.join(run.ablated)}" if run.ablated else run.variant


def _remark(run: Run) -> str:
    """What a footnote says about a run."""
    scale = [] if run.scale is None else [f"scale {run.scale:g}"]
    count = run.stepped_nonfinite
    stepped = (
        [f"{count} parameter{'' if count == 1 else 's'} non-finite after the step"] if count else []
    )
    return " · ".join([*run.notes, *scale, *stepped])


def _marks(rows: Sequence[Run]) -> dict[str, str]:
    """Each different footnote and its mark."""
    remarks = list(dict.fromkeys(filter(None, map(_remark, rows))))
    return {words: str(i).translate(_RAISED_DIGITS) for i, words in enumerate(remarks, start=1)}


def _mark(run: Run, marks: dict[str, str]) -> str:
    mark = marks.get(_remark(run))
    return f" {mark}" if mark else ""


def _run_columns(rows: Sequence[Run], names: Sequence[Text], sheet: Sheet) -> list[Column]:
    """The columns; of the norms, as many as there is room for."""
    groups = list(dict.fromkeys(group.name for run in rows for group in run.groups))
    loss = Column("loss", [_cell(run, figure(run.loss)) for run in rows])
    total = Column("", [_cell(run, norm(run.groups)) for run in rows], rank=1)
    norms = [_group_column(name, rows, rank=3 + i) for i, name in enumerate(groups)]
    tail = [
        Column("non-finite", [_cell(run, _count(run)) for run in rows]),
        Column("culprit", [said(short(run.culprit or NONE)) for run in rows]),
        Column("dtype", [said(run.culprit_dtype or NONE) for run in rows], rank=2),
    ]
    if len({run.culprit_line for run in rows if run.culprit}) > 1:
        tail.append(Column("line", [said(run.culprit_line or NONE) for run in rows], rank=3))
    head = [Column("Runs", names), loss]
    if not norms:
        return [*head, *tail]
    if len(norms) == 1:
        return [*head, replace(total, head="‖g‖"), *tail]
    first = replace(norms[0], head=f"‖g‖ {norms[0].head}")
    if len(norms) <= FEW and sheet.fits([*head, first, *norms[1:], *tail]):
        return [*head, first, *norms[1:], *tail]
    return [*head, replace(total, head="‖g‖ total"), *norms, *tail]


def _cell(run: Run, text: Text) -> Text:
    """The cell of a run that came to its end."""
    return Text() if run.raised is not None else text


def _count(run: Run) -> Text:
    return said((share(run.groups), BAD if run.nonfinite else ""))


def _group_column(name: str, rows: Sequence[Run], rank: int) -> Column:
    """The gradient norms of one group of parameters."""
    norms = [next((g.norm for g in run.groups if g.name == name), None) for run in rows]
    cells = [Text(NONE) if norm is None else figure(norm) for norm in norms]
    return Column(clean(name), cells, rank)


def _ablation_table(rows: Sequence[Ablation]) -> Grid:
    """The table; weights and ops have a column where they are known."""
    weights = [_change(a.weight_before, a.weight_after) for a in rows]
    ops = [_change(_sum(a.ops_before), _sum(a.ops_after)) for a in rows]
    columns = [
        Column("Ablations", [said(_label(a)) for a in rows]),
        Column("took effect", [said(_effect(a)) for a in rows]),
        *(
            [Column("weight", [said(words or NONE) for words in weights], rank=1)]
            if any(weights)
            else []
        ),
        *([Column("ops", [said(words or NONE) for words in ops], rank=2)] if any(ops) else []),
        Column("outcome", [_result(a) for a in rows]),
    ]
    spans = {i: raised(a.raised) for i, a in enumerate(rows) if a.raised is not None}
    return Grid(columns, spans)


def _label(ablation: Ablation) -> str:
    names = ", ".join(ablation.names)
    return f"− {names}" if ablation.mode == "without" else f"alone: {names}"


def _effect(ablation: Ablation) -> str | tuple[str, str]:
    """Whether it took effect: a question that a term alone does not raise."""
    return _TOOK_EFFECT[ablation.took_effect] if ablation.mode == "without" else NONE


def _sum(ops: tuple[int, int] | None) -> int | None:
    return None if ops is None else sum(ops)


def _change(before: float | None, after: float | None) -> str:
    """A value before and after, as far as either is known."""
    if before is None and after is None:
        return ""
    return " → ".join("?" if v is None else number(v) for v in (before, after))


def _result(ablation: Ablation) -> Text:
    """The outcome with its figures."""
    if ablation.raised is not None:
        return Text()
    text = said(("cures: ", GOOD)) if ablation.cures else Text()
    text += outcome(ablation)
    if not ablation.groups:
        return text
    size = f", ‖g‖ {norm(ablation.groups)}"
    return text + said(size if ablation.finite else f" ({share(ablation.groups)})")
