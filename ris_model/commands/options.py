"""Options: what several commands share, and how each answers wrong input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

Preset = Annotated[str, typer.Option(help="tiny, small or full.")]
Profile = Annotated[str, typer.Option(help="incident or sound.")]

# What torch.manual_seed takes.
_GREATEST = 2**63 - 1
# Where a command's optional packages come from.
_EXTRA = "pip install 'nanhunt[ris]'"


@contextmanager
def answering_wrong_input() -> Iterator[None]:
    """Turn a wrong option, file or folder into its one sentence and exit code 2."""
    try:
        yield
    except (ValueError, IndexError, OSError) as error:
        typer.echo(f"ris-model: {error}", err=True)
        raise typer.Exit(2) from None


def need_extra(package: str) -> None:
    """Raise a ValueError that says what to install where a package of the extra is missing."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        msg = f"this needs {package}, which is not installed: {_EXTRA}"
        raise ValueError(msg)


def ask_whole(name: str, value: int, least: int) -> int:
    """Return a whole number; a ValueError when it is too small, or too large for a seed."""
    if not least <= value <= _GREATEST:
        msg = f"{name} is {value}; give a whole number from {least} to {_GREATEST}"
        raise ValueError(msg)
    return value
