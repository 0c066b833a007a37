"""`nanhunt run`: a training script as it is, watched."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from nanhunt.errors import UsageError


def run(  # noqa: PLR0913 - one parameter per option of the command
    target: Annotated[
        str, typer.Argument(metavar="SCRIPT", help="A script, or with -m the name of a module.")
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[ARGUMENTS]...", help="Its own, options too.")
    ] = None,
    *,
    module: Annotated[bool, typer.Option("-m", help="Run a module, as python -m does.")] = False,
    mode: Annotated[
        str,
        typer.Option(
            help="light: look at the gradients before each optimizer step, record once one has "
            "failed. full: record everything from the start."
        ),
    ] = "light",
    out: Annotated[Path, typer.Option(help="Folder for the reports.")] = Path("nanhunt-out"),
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Go on at a culprit; each is told once.")
    ] = False,
    after_step: Annotated[
        int, typer.Option(help="Begin to watch after so many optimizer steps.", min=0)
    ] = 0,
    quiet_steps: Annotated[
        int,
        typer.Option(help="Good steps after which light mode stops recording again.", min=1),
    ] = 200,
) -> Callable[[], None]:
    """Run a training script as it is, and name the operation that makes a step non-finite.

    Options of nanhunt stand before SCRIPT; everything behind it belongs to the script. The exit
    code is the script's own, or 1 after a finding.
    """
    from nanhunt.launch import Launch, Order, Program

    program = Program(target, tuple(arguments or ()), module)
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        where = "a file" if there == out else f"below the file {there}"
        raise UsageError(f"--out {out} is {where}; name a folder, which need not exist")
    order = Order(
        mode=_read_mode(mode),
        out=out,
        keep_going=keep_going,
        after_step=after_step,
        quiet=quiet_steps,
        name=program.name,
        command=shlex.join(["nanhunt", *sys.argv[1:]]),
    )
    program.check()
    return Launch(program, order)


def _read_mode(mode: str) -> Literal["light", "full"]:
    if mode == "light":
        return "light"
    if mode == "full":
        return "full"
    raise UsageError(f"--mode is light or full; got {mode!r}")
