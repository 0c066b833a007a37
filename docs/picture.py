"""Makes the picture of the README: `python docs/picture.py` writes docs/picture.svg.

It is the report of the bundled case at its smallest size, as the terminal shows it, up to the
trials; with a saved report, `python docs/picture.py REPORT.json`, it is that one. The picture
loads no font: where a monospaced one is missing the letters are stretched to their places.
"""

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.segment import Segment, Segments
from rich.terminal_theme import TerminalTheme

import nanhunt
from nanhunt.loading import load
from nanhunt.records import Report
from nanhunt.report import renderer

PICTURE = Path(__file__).with_name("picture.svg")
WIDTH = 100
END = " Trials"  # what comes from there on is for those who doubt
COMMAND = "nanhunt replay ris:incident --set preset=tiny --ablate lam_gap"
DARK = TerminalTheme(
    (23, 29, 38),
    (228, 233, 240),
    [
        (58, 70, 85), (255, 123, 114), (86, 201, 138), (224, 176, 80),
        (108, 178, 245), (201, 155, 240), (127, 209, 176), (228, 233, 240),
    ],
)  # fmt: skip


def hunt() -> Report:
    """The report of the bundled case."""
    subject = load("ris:incident", options={"preset": "tiny"}).subject
    return nanhunt.hunt(subject, ablate=["lam_gap"])


def draw(report: Report) -> str:
    """The first part of the report as SVG, which needs nothing else."""
    console = Console(
        record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    lines = console.render_lines(renderer("terminal")(report), pad=False)
    texts = ["".join(segment.text for segment in line) for line in lines]
    end = next((i for i, text in enumerate(texts) if text.startswith(END)), len(texts))
    console.print(f"[bold]$ {COMMAND}[/bold]", highlight=False)
    for line in lines[:end]:
        console.print(Segments([*line, Segment.line()]), end="")
    svg = console.export_svg(title="nanhunt", theme=DARK, unique_id="nanhunt")
    # Rich names a font on a server; the family that it falls back to is enough.
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code", "Cascadia Mono, Menlo, Consolas, DejaVu Sans Mono")


def main() -> None:
    """Draw, and write."""
    report = nanhunt.load(sys.argv[1]) if len(sys.argv) > 1 else hunt()
    PICTURE.write_text(draw(report), encoding="utf-8")


if __name__ == "__main__":
    main()
