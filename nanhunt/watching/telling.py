"""Telling what an inquest found, in words.

What draws terminals takes random numbers from Python's generator, when it is imported and later;
a training is to have the same ones as without it.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanhunt.records import Report
from nanhunt.snapshot import keep_generators


def tell(report: Report, capsule: Path | None) -> None:
    """Print a report on standard error, and where the step is kept."""
    put_back = keep_generators()
    try:
        from rich.console import Console

        from nanhunt.report import renderer

        width: Mapping[str, Any] = {} if sys.stderr.isatty() else {"width": 100}
        console = Console(file=sys.stderr, **width)
        console.print(renderer("terminal")(report))
        if capsule is not None:
            console.print(f" capsule    {capsule}", highlight=False, soft_wrap=True)
    finally:
        put_back()


def tell_shortly(report: Report) -> str:
    """The message of an error."""
    put_back = keep_generators()
    try:
        from nanhunt.report.short import tell as tell_short

        return tell_short(report)
    finally:
        put_back()
