"""Commands that are more than a few lines: `gate`, `init`, `diff` and `health`, one per file."""

from typing import TYPE_CHECKING

from nanhunt.commands.diff import diff
from nanhunt.commands.gate import gate
from nanhunt.commands.health import health
from nanhunt.commands.init import init

if TYPE_CHECKING:
    import typer


def add_to(app: "typer.Typer") -> None:
    """Put them among the commands of an application."""
    for command in (gate, init, diff, health):
        app.command()(command)
