"""Commands that are more than a few lines, one per file."""

from typing import TYPE_CHECKING

from nanhunt.commands.diff import diff
from nanhunt.commands.explain import explain
from nanhunt.commands.gate import gate
from nanhunt.commands.health import health
from nanhunt.commands.init import init
from nanhunt.commands.run import run

if TYPE_CHECKING:
    import typer


def add_to(app: "typer.Typer") -> None:
    """Put them among the commands of an application."""
    for command in (explain, gate, init, diff, health):
        app.command()(command)
    # What stands behind the script belongs to the script.
    app.command(context_settings={"allow_interspersed_args": False})(run)
