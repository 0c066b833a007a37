"""The command line: the list of its commands."""

from __future__ import annotations

import typer

from ris_model.commands.data import generate
from ris_model.commands.evaluate import evaluate
from ris_model.commands.inspect import describe, step
from ris_model.commands.predict import predict
from ris_model.commands.search import search
from ris_model.commands.train import train

app = typer.Typer(
    help="A near-field localisation model behind a reconfigurable surface.",
    no_args_is_help=True,
    add_completion=False,
)
for command in (describe, step, generate, train, search, evaluate, predict):
    app.command()(command)


def main() -> None:
    """Run the command line."""
    app(prog_name="ris-model")


if __name__ == "__main__":
    main()
