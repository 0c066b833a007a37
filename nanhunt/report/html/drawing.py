"""What is drawn: the way of the poison, the size of things per module and per step, as SVG.

matplotlib draws in the light palette; the page turns these very colours into those of the dark one
by its style sheet, so that a drawing taken out of the page still looks right.
"""

import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from rich.cells import cell_len

from nanhunt.records import Finding, ModuleFacts, Pace, Step
from nanhunt.report.html.sizes import outer_modules
from nanhunt.report.layout import clean, short
from nanhunt.report.verdict import stations

INK, FAINT, LINE, PANEL = "#1b2330", "#5f6b7a", "#c9d1da", "#f3f5f8"
BAD, BAD_SOFT, COOL, WARM = "#c62f2f", "#fbe9e8", "#2b6cb0", "#b7791f"
PIXEL = 1 / 72  # SVG points; the page scales them
LETTER = 0.62  # width of a monospaced letter, in font sizes
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "monospace",
    "axes.unicode_minus": False,
    "axes.formatter.use_mathtext": False,
}
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def _drawn(figure: Figure, name: str, label: str) -> Markup:
    """The figure as an element that scales with its place; ids are those of `name` alone."""
    file = io.StringIO()
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has its own
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(file, metadata=_NO_METADATA)
    svg = file.getvalue()
    size = figure.get_size_inches() / PIXEL
    opening = Markup(
        '<svg class="drawing" role="img" aria-label="{}" viewBox="0 0 {:.0f} {:.0f}" '
        'style="max-width:{:.0f}px" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    ).format(label, *size, size[0] * 1.25)
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    return opening + Markup(body)  # noqa: S704 - matplotlib escapes its texts


def _sheet(width: float, height: float) -> tuple[Figure, Any]:
    """A figure of so many pixels, and axes without anything, in pixels from the top."""
    figure = Figure(figsize=(width * PIXEL, height * PIXEL), facecolor="none")
    axes = figure.add_axes((0, 0, 1, 1), frameon=False)
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    return figure, axes


def _fitted(words: str, width: float, size: float) -> str:
    """The words as far as they fit; of a name that is too long the end stays, which tells most."""
    words = clean(words)
    room = max(int(width / (size * LETTER)), 2)
    if cell_len(words) <= room:
        return words
    while words and cell_len(words) > room - 1:
        words = words[max(len(words) - room + 1, 1) :]
    return f"…{words}"


# --- the way of the poison -----------------------------------------------------------------------

WIDTH, BOX, GAP, EDGE = 400.0, 44.0, 24.0, 8.0
MOST = 14  # stations that are drawn; the list below the drawing has them all
ABREAST = 2
GROUPS = 12


def way(finding: Finding, name: str) -> Markup | None:
    """From the culprit through lines and modules to the groups of parameters; None without one."""
    if not finding.path and not finding.poisoned:
        return None
    boxes = list(_boxes(finding))
    groups = finding.poisoned[:GROUPS]
    rows = math.ceil(len(groups) / ABREAST)
    height = EDGE * 2 + len(boxes) * (BOX + GAP) - GAP + (rows * (BOX + 10) + 26 if rows else 0)
    with mpl.rc_context(_SETTINGS):
        figure, axes = _sheet(WIDTH, height)
        top = EDGE
        for i, box in enumerate(boxes):
            _draw_box(axes, box, (EDGE, top, WIDTH - 2 * EDGE), is_first=i == 0)
            top += BOX
            if i + 1 < len(boxes):
                _draw_arrow(axes, (WIDTH / 2, top), (WIDTH / 2, top + GAP))
                top += GAP
        _draw_groups(axes, groups, top)
    return _drawn(figure, name, "The way of the non-finite values from the culprit to parameters")


class _Box(NamedTuple):
    """One station: its name, what stands below, and whether it is a module of the model."""

    name: str
    below: str
    is_module: bool


def _boxes(finding: Finding) -> Iterator[_Box]:
    """The culprit, then each station; of a very long way the middle is counted only."""
    inside = short(finding.formula_op or "")
    head = " → ".join(filter(None, [finding.node or short(finding.op), inside]))
    place = f"{finding.file}:{finding.line}" if finding.file else finding.where or ""
    yield _Box(head, place or "line of code not known", is_module=False)
    rest = stations(finding.path)[1:]  # the way starts at the culprit
    if len(rest) > MOST:
        cut = len(rest) - MOST + 1
        middle: tuple[str, list[Step]] = (f"… {cut} more stations …", [])
        rest = [*rest[: MOST - 5], middle, *rest[len(rest) - 4 :]]
    for name, steps in rest:
        ops = " → ".join(dict.fromkeys(step.node or short(step.op) for step in steps))
        yield _Box(name, ops, is_module=bool(steps and steps[0].module))


def _draw_box(axes: Any, box: _Box, where: tuple[float, float, float], *, is_first: bool) -> None:
    left, top, width = where
    shape = f"round,pad=0,rounding_size={10 if box.is_module else 2}"
    face, edge = (BAD_SOFT, BAD) if is_first else (PANEL, LINE)
    axes.add_patch(
        FancyBboxPatch((left, top), width, BOX, boxstyle=shape, fc=face, ec=edge, lw=1.2)
    )
    middle = left + width / 2
    put: Callable[..., object] = axes.text
    colour = BAD if is_first else INK
    put(
        middle, top + 18, _fitted(box.name, width - 16, 12),
        size=12, ha="center", color=colour, weight="bold" if is_first else "normal",
    )  # fmt: skip
    put(middle, top + 34, _fitted(box.below, width - 16, 10), size=10, ha="center", color=FAINT)


def _draw_arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, color=BAD, lw=1.4, shrinkA=2, shrinkB=1
        )
    )


def _draw_groups(axes: Any, groups: Sequence[tuple[str, int, int]], top: float) -> None:
    """The groups of parameters side by side, each filled as far as it is poisoned."""
    if not groups:
        return
    abreast = min(ABREAST, len(groups))
    width = (WIDTH - 2 * EDGE - (abreast - 1) * 10) / abreast
    for i, (name, count, total) in enumerate(groups):
        left = EDGE + (i % abreast) * (width + 10)
        high = top + 26 + (i // abreast) * (BOX + 10)
        if i < abreast:
            _draw_arrow(axes, (WIDTH / 2, top), (left + width / 2, high))
        style: Any = {"boxstyle": "round,pad=0,rounding_size=10", "lw": 1.2}
        part = width * min(max(count / max(total, 1), 0.0), 1.0)
        axes.add_patch(FancyBboxPatch((left, high), width, BOX, fc=PANEL, ec=LINE, **style))
        if part > 4:
            axes.add_patch(FancyBboxPatch((left, high), part, BOX, fc=BAD_SOFT, ec="none", **style))
        axes.text(
            left + width / 2, high + 18, _fitted(name, width - 16, 12),
            size=12, ha="center", color=INK,
        )  # fmt: skip
        told = f"{count} of {total} poisoned"
        axes.text(
            left + width / 2, high + 34, _fitted(told, width - 8, 10),
            size=10, ha="center", color=BAD if count else FAINT,
        )  # fmt: skip


# --- sizes ---------------------------------------------------------------------------------------

ROWS = 100  # modules that are drawn; the table has them all
ROW, HEAD, FOOT, NAMES = 15.0, 24.0, 26.0, 240.0


def modules(facts: Sequence[ModuleFacts], name: str) -> Markup | None:
    """Per module the largest output, its root mean square, and the gradient that arrives."""
    rows = outer_modules(facts, ROWS)
    if not rows:
        return None
    height, width = HEAD + FOOT + ROW * len(rows), 660.0
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(width * PIXEL, height * PIXEL), facecolor="none")
        room = (width - NAMES - 40) / 2
        panels = []
        for i, title in enumerate(("output: ○ rms  ● largest", "gradient arriving: ● norm")):
            left = NAMES + i * (room + 20)
            box = (left / width, FOOT / height, room / width, ROW * len(rows) / height)
            panels.append(_panel(figure, box, title, len(rows)))
        for i, row in enumerate(rows):
            _row_name(panels[0], row, i)
        outputs = [(row.largest, row.nonfinite_out) for row in rows]
        gradients = [(row.gradient, row.nonfinite_gradient) for row in rows]
        _dots(panels[0], [(row.rms, 0) for row in rows], is_hollow=True)
        _dots(panels[0], outputs)
        _dots(panels[1], gradients)
        for panel in panels:
            _finish(panel.xaxis, is_empty=not panel.collections)
    return _drawn(figure, name, "Size of outputs and of arriving gradients per module")


def _panel(figure: Figure, box: tuple[float, float, float, float], title: str, rows: int) -> Any:
    panel = figure.add_axes(box)
    panel.set(ylim=(rows - 0.5, -0.5), yticks=[], facecolor="none")
    panel.set_title(title, size=10, color=FAINT, loc="left", pad=6)
    for side in panel.spines.values():
        side.set_color(LINE)
    for i in range(0, rows, 2):
        panel.axhspan(i - 0.5, i + 0.5, fc=PANEL, ec="none", zorder=0)
    return panel


def _row_name(panel: Any, row: ModuleFacts, i: int) -> None:
    panel.annotate(
        _fitted(row.module, NAMES - 12, 9.5), (0, i), (-8, 0), ("axes fraction", "data"),
        textcoords="offset points", ha="right", va="center", size=9.5,
        color=BAD if row.nonfinite_out or row.nonfinite_gradient else INK,
    )  # fmt: skip


def _logarithm(value: float | None) -> float | None:
    """The decimal logarithm, where there is one."""
    if value is None or not math.isfinite(value) or value <= 0:
        return None
    return math.log10(value)


def _dots(
    panel: Any, values: Sequence[tuple[float | None, int]], *, is_hollow: bool = False
) -> None:
    """One dot per row; a cross at the right edge where something is not finite."""
    found = [(x, i) for i, (v, _) in enumerate(values) if (x := _logarithm(v)) is not None]
    if found:
        face = "none" if is_hollow else COOL
        panel.scatter(*zip(*found, strict=True), s=16, fc=face, ec=COOL, lw=1, zorder=3)
    lost = [i for i, (v, n) in enumerate(values) if n or not math.isfinite(0.0 if v is None else v)]
    if lost:
        panel.plot(
            [0.965] * len(lost), lost, "x", color=BAD, ms=5, mew=1.6, zorder=4,
            transform=panel.get_yaxis_transform(),
        )  # fmt: skip


def _finish(axis: Any, count: int = 5, *, is_empty: bool = False) -> None:
    """Ticks at whole powers of ten; none where there is nothing that has a size."""
    axes = axis.axes
    axes.margins(x=0.12)
    axis.set_major_locator(
        NullLocator() if is_empty else MaxNLocator(count, integer=True, min_n_ticks=1)
    )
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"1e{x:.0f}"))
    axes.tick_params(labelsize=9, labelcolor=FAINT, length=3, color=LINE)
    axes.grid(visible=True, axis=axis.axis_name, color=LINE, lw=0.5, alpha=0.7)


def pace(steps: Sequence[Pace], name: str) -> Markup | None:
    """Loss, gradient norm and largest parameter over the steps; None of a single step."""
    if len(steps) < 2:
        return None
    width, height = 640.0, 200.0
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(width * PIXEL, height * PIXEL), facecolor="none")
        axes: Any = figure.add_axes((0.09, 0.16, 0.66, 0.78), facecolor="none")
        for side in axes.spines.values():
            side.set_color(LINE)
        lines = (
            ("loss", COOL, [p.loss for p in steps]),
            ("gradient norm", INK, [p.gradient for p in steps]),
            ("largest parameter", WARM, [p.largest for p in steps]),
        )
        at = [p.step for p in steps]
        for k, (label, colour, values) in enumerate(lines):
            sizes = [_logarithm(abs(v)) for v in values]
            gaps = [math.nan if size is None else size for size in sizes]
            axes.plot(at, gaps, marker="o", ms=4, lw=1.4, color=colour)
            lost = [step for step, v in zip(at, values, strict=True) if not math.isfinite(v)]
            axes.plot(
                lost, [0.94 - 0.09 * k] * len(lost), "x", color=BAD, ms=6, mew=1.8,
                transform=axes.get_xaxis_transform(),
            )  # fmt: skip
            axes.text(
                1.03, 0.94 - 0.09 * k, label, size=10, color=colour, va="center",
                transform=axes.transAxes,
            )  # fmt: skip
        _finish(axes.yaxis)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("step (✕ non-finite)", size=9, color=FAINT)
    return _drawn(figure, name, "Loss, gradient norm and largest parameter over the steps")
