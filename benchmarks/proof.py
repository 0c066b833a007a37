"""What nanhunt proves about a case, besides naming its culprit.

`repro_works` is given the file of a case and is to be run in a process of its own; it sees the
`Program` and nothing of what is known about it.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from protocol import Program, isolated

import nanhunt
from nanhunt.hunting import Order, Plan, investigate


def subject_of(program: Program) -> nanhunt.Subject:
    """The program as nanhunt takes it."""
    model, batch, loss_fn = program.build()
    return nanhunt.Subject(
        model,
        program.batch_at or (lambda _: batch),
        loss_fn,
        optimizer=program.make_optimizer(model) if program.make_optimizer else None,
        scaler=program.make_scaler() if program.make_scaler else None,
        train_step=program.train_step,
    )


def repro_works(path: Path) -> tuple[bool, str]:
    """Whether the script of the culprit shows it with torch alone, and what nanhunt says of it."""
    program = Program.of(path)
    with tempfile.TemporaryDirectory() as folder:
        order = Order(Path(folder) / "repro")
        plan = Plan(precisions=(), steps=program.steps, repro=order)
        repro = investigate(subject_of(program), plan)[0].repro
    if repro is None:
        return False, "no culprit"
    return repro.works, repro.note or repro.shown


PROVED = ("repro",)


def proved_in(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was tried to be proved."""
    return [name for name in PROVED if any(name in row for row in rows)]


def with_proof(row: Mapping[str, Any], path: Path, limit: float) -> dict[str, Any]:
    """The row of a fault with what nanhunt proves about it; that of a control as it is."""
    if row["hit"] is None:
        return dict(row)
    made, error = isolated(repro_works, path, limit=limit)
    works, told = made or (False, str(error))
    return {**row, "repro": works, "repro_told": told}


def unproved_of(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The faults of which the script shows nothing, and why."""
    without = {row["id"]: row["repro_told"] for row in rows if row.get("repro") is False}
    return pd.DataFrame({"why": without}).rename_axis("no repro")
