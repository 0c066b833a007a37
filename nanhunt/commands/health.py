"""`nanhunt health`: what a run suffers from, by the figures of its steps; torch is not needed."""

import json as encoder
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nanhunt.commands.screen import check_folder, wide_console

if TYPE_CHECKING:
    from nanhunt.health import Checkup
    from nanhunt.report.health import Record

SCHEMA = 1


def health(
    file: Annotated[
        Path, typer.Argument(help="A CSV file of figures, or of another logger with step and loss.")
    ],
    *,
    json: Annotated[
        Path | None, typer.Option(help="Write the findings there; - is standard output.")
    ] = None,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="1 on a symptom.")] = False,
) -> None:
    """Say what a run suffers from, by the figures of its steps: symptoms, their steps, advice."""
    from nanhunt.health import check
    from nanhunt.report.health import read, render

    to_stdout = json is not None and str(json) == "-"
    check_folder("--json", None if to_stdout else json)
    record = read(file)
    checkup = check(record.figures)
    if json is not None:
        text = _dump(record, checkup, str(file))
        if to_stdout:
            typer.echo(text, nl=False)
        else:
            from nanhunt import store

            store.write(text, json)
    if not to_stdout:
        page = render(
            record.figures, checkup=checkup, title=str(file), unit=record.unit, notes=record.notes
        )
        wide_console().print(page)
    if exit_code and checkup.symptoms:
        raise typer.Exit(1)


def _dump(record: "Record", checkup: "Checkup", file: str) -> str:
    """The findings as strict JSON in ASCII."""
    figures = record.figures
    body = {
        "schema": SCHEMA,
        "file": file,
        "unit": record.unit,
        "steps": len(figures),
        "made": sum(f.stepped for f in figures),
        "symptoms": [asdict(symptom) for symptom in checkup.symptoms],
        "cannot_tell": [{"slug": slug, "why": why} for slug, why in checkup.unknown],
        "not_found": list(checkup.absent),
        "notes": list(record.notes),
    }
    return encoder.dumps(body, indent=2, allow_nan=False) + "\n"
