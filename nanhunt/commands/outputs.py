"""Where the command line writes: options that name files, refused before the work where they must.

A file is written in one piece: afterwards it is the whole new one or the old one.
"""

from pathlib import Path
from typing import Annotated

import typer

from nanhunt.commands.screen import check_folder
from nanhunt.errors import UsageError
from nanhunt.records import Report

Html = Annotated[
    Path | None, typer.Option("--html", help="Write the report there as one HTML page.")
]
Markdown = Annotated[
    Path | None,
    typer.Option("--markdown", help="Write the report there as Markdown, for an issue."),
]


def check_files(**files: Path | None) -> None:
    """Refuse files that cannot be written, and two options that name the same one."""
    taken: dict[Path, str] = {}
    for name, path in files.items():
        check_folder(f"--{name}", path)
        if path is None:
            continue
        first = taken.setdefault(path.absolute(), name)
        if first != name:
            raise UsageError(f"--{first} and --{name} both name {path}; give each its own file")
    if (events := files.get("events")) is not None:
        from nanhunt.report.events import check_format

        check_format(events)


def write_pages(report: Report, *, html: Path | None, markdown: Path | None) -> None:
    """Write the forms of the report that were asked for."""
    from nanhunt import store
    from nanhunt.report import writer

    for form, path in (("html", html), ("markdown", markdown)):
        if path is not None:
            store.write(writer(form)(report), path)
