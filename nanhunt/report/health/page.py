"""The health of a run on a page: the symptoms, what to do, then the figures for those who doubt."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.jupyter import JupyterMixin
from rich.text import Text

from nanhunt.health import BY_SLUG, Checkup, Symptom, check, without_nonfinite
from nanhunt.records import Figures
from nanhunt.report.health import sparks
from nanhunt.report.layout import Column, Sheet, beside, number, said

PROSE = 100
MARGIN = 10
SPARK = 24
_HEADS = ("first", "median", "last", "lowest", "highest")
_RANKS = (3, 2, 1, 5, 4)  # what goes first where room is short

Series = Sequence[float | None]


def render(
    figures: Sequence[Figures],
    *,
    checkup: Checkup | None = None,
    title: str = "",
    unit: str = "step",
    notes: Sequence[str] = (),
) -> RenderableType:
    """The findings and the figures of a run; it also shows itself in a notebook."""
    known = without_nonfinite(figures)
    return Page(known, checkup or check(known), title, unit, tuple(notes))


@dataclass(frozen=True, slots=True)
class Page(JupyterMixin):
    """A page laid out when the width of the console is known."""

    figures: Sequence[Figures]
    checkup: Checkup
    title: str = ""
    unit: str = "step"
    notes: tuple[str, ...] = field(default=())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the lines."""
        sheet = Sheet(console, options.max_width)
        yield from sheet.flowed(_header(self), " · ")
        inner = sheet.inside(1)
        has_blocks = not (console.no_color or options.ascii_only)
        sections = (
            _verdict(self, inner),
            _details(self, inner.inside(max(inner.width - PROSE, 0))),
            _table(self, inner, has_blocks=has_blocks),
            _rest(self, inner),
        )
        for lines in sections:
            for i, line in enumerate(lines):
                if i == 0:
                    yield Text()
                yield Text(" ") + line if line else line


def _header(page: Page) -> list[str]:
    figures = page.figures
    made = sum(f.stepped for f in figures)
    parts = ["nanhunt health", page.title] if page.title else ["nanhunt health"]
    parts.append(f"{len(figures)} {page.unit}{'' if len(figures) == 1 else 's'}, {made} made")
    return [*parts, f"last {page.unit} {figures[-1].step}"] if figures else parts


def _verdict(page: Page, sheet: Sheet) -> list[Text]:
    """The verdict in a word, and a table of what was found."""
    checkup = page.checkup
    many, asked = len(checkup.symptoms), len(BY_SLUG) - len(checkup.unknown)
    if many:
        word, style = "SYMPTOMS" if many > 1 else "SYMPTOM", "bold white on red"
    elif asked:
        word, style = "NO SYMPTOM", "bold white on green"
    else:
        word, style = "CANNOT TELL", "bold"
    told = f"{many} of {len(BY_SLUG)} rules apply; {len(checkup.unknown)} cannot be judged"
    lines = [said((f"{word}", style), f"  {told}"), Text("─" * sheet.width, "dim")]
    if many:
        columns = [
            Column("symptom", [said((s.slug, "bold")) for s in checkup.symptoms]),
            Column(f"{page.unit}s", [said(_span(s)) for s in checkup.symptoms]),
            Column("", [said(s.title) for s in checkup.symptoms]),
        ]
        lines += sheet.tabled(columns)
    return lines


def _span(symptom: Symptom) -> str:
    if symptom.first == symptom.last:
        return str(symptom.first)
    return f"{symptom.first}–{symptom.last}"


def _details(page: Page, sheet: Sheet) -> Iterator[Text]:
    """What was measured of each symptom, and what to do."""
    inner = sheet.inside(MARGIN)
    for i, symptom in enumerate(page.checkup.symptoms):
        if i:
            yield Text()
        yield said((symptom.slug, "bold"))
        measured = [w for words in symptom.evidence for w in inner.wrapped(said(words))]
        yield from beside(said(("measured", "dim")), measured, MARGIN)
        yield from beside(said(("to do", "dim")), inner.wrapped(said(symptom.advice)), MARGIN)


def _table(page: Page, sheet: Sheet, *, has_blocks: bool) -> list[Text]:
    """The course of every figure, and a few numbers of it."""
    rows = dict(_series(page.figures))
    if not rows:
        return []
    shown = [sparks.draw(values, SPARK, blocks=has_blocks) for values in rows.values()]
    finite = [[value for value in values if value is not None] for values in rows.values()]
    logs = [bool(known) and sparks.is_logarithmic(known) for known in finite]
    lost = [len(values) - len(known) for values, known in zip(rows.values(), finite, strict=True)]
    numbers = [_numbers(values) for values in rows.values()]
    columns = [Column("Figures", [said(name) for name in rows])]
    columns.append(Column("course", [said((spark, "cyan")) for spark in shown]))
    columns += [
        Column(head, [said(cells[k]) for cells in numbers], _RANKS[k])
        for k, head in enumerate(_HEADS)
    ]
    if any(lost):
        columns.append(Column("not finite", [said(str(n) if n else "") for n in lost]))
    if any(logs):
        columns.append(Column("", [said(("log" if is_log else "", "dim")) for is_log in logs]))
    return sheet.tabled(columns)


def _numbers(values: Series) -> list[str]:
    known = [value for value in values if value is not None]
    if not known:
        return ["–"] * len(_HEADS)
    chosen = (values[0], median(known), values[-1], min(known), max(known))
    return ["–" if value is None else number(value) for value in chosen]


def _series(figures: Sequence[Figures]) -> Iterator[tuple[str, Series]]:
    """What was measured, by name; None where it was not finite."""
    yield "loss", [f.loss for f in figures if f.why != "raised"]
    plain: dict[str, Series] = {
        "validation": [f.validation for f in figures if f.validated],
        "rate": [max(f.rates) for f in figures if f.rates],
        "scale": [f.scale for f in figures if f.scale is not None],
        "clipped": [f.clipped for f in figures if f.clipped is not None],
        "seconds": [f.seconds for f in figures if f.seconds],
        "of it inside": [f.inside for f in figures if f.inside],
    }
    groups: dict[str, list[float | None]] = {}
    for f in figures:
        for name, norm in f.norms:
            groups.setdefault(f"norm {name}", []).append(norm)
    for f in figures:
        for name, ratio in f.updates:
            groups.setdefault(f"update {name}", []).append(ratio)
    for name, values in (plain | groups).items():
        if values:
            yield name, values


def _rest(page: Page, sheet: Sheet) -> Iterator[Text]:
    """What cannot be told, what was not found, and notes."""
    entries = [("cannot tell", f"{slug}: {why}") for slug, why in page.checkup.unknown]
    fine = page.checkup.absent
    entries += [("not found", ", ".join(fine))] if fine else []
    entries += [("note", note) for note in page.notes]
    width = max(len(label) for label, _ in entries) + 2 if entries else 0
    before = ""
    for label, words in entries:
        shown = said((label if label != before else "", "dim"))
        yield from beside(shown, sheet.inside(width).wrapped(said(words)), width)
        before = label
