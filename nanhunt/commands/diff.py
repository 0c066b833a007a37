"""`nanhunt diff`: what changed between two saved reports; torch is not needed."""

from pathlib import Path
from typing import Annotated

import typer

from nanhunt.commands.screen import wide_console


def diff(
    before: Annotated[Path, typer.Argument(help="A report saved with --json.")],
    after: Annotated[Path, typer.Argument(help="Another one.")],
    *,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="1 where they differ.")] = False,
) -> None:
    """Say what changed between two reports: of two commits, precisions or machines."""
    from nanhunt import store
    from nanhunt.analysis import compare
    from nanhunt.report import difference

    changes = compare(store.load(before), store.load(after))
    wide_console().print(difference.render(changes))
    if exit_code and changes:
        raise typer.Exit(1)
