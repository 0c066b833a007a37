"""What nanhunt proves about a case, besides naming its culprit.

`proofs` is given the file of a case and is to be run in a process of its own; it sees the
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
from nanhunt.records import Report


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


def proofs(path: Path) -> dict[str, Any]:
    """What nanhunt proves about a case.

    `fix` is whether some change of the program is proven: the step is finite with it, the loss is
    as before where it was finite, and the gradients agree with those of FP64 where there are any.
    `agrees` is whether they could be compared at all, `sole` whether the culprit is shown to be the
    only cause, `repro` whether the script of it shows the failure with torch alone.
    """
    program = Program.of(path)
    with tempfile.TemporaryDirectory() as folder:
        order = Order(Path(folder) / "repro")
        plan = Plan(precisions=(), steps=program.steps, repro=order)
        report = investigate(subject_of(program), plan)[0]
    proven = [trial for trial in report.trials if trial.is_proven]
    repro = report.repro
    return {
        "fix": bool(proven),
        "agrees": any(trial.gradient_error is not None for trial in proven),
        "sole": any(trial.finite for trial in report.trials if trial.is_neutralising),
        "repro": repro is not None and repro.works,
        "fix_told": proven[0].recipe if proven else _unproven(report),
        "repro_told": "no culprit" if repro is None else repro.note or repro.shown,
    }


def _unproven(report: Report) -> str:
    finite = [trial for trial in report.trials if trial.finite and not trial.is_neutralising]
    if not finite:
        return f"none of {len(report.trials)} trials is finite"
    errors = (finite[0].loss_change, finite[0].gradient_error)
    return f"{finite[0].recipe}: loss {errors[0]}, gradient {errors[1]}"


PROVED = ("fix", "agrees", "sole", "repro")


def proved_in(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was tried to be proved."""
    return [name for name in PROVED if any(name in row for row in rows)]


def with_proof(row: Mapping[str, Any], path: Path, limit: float) -> dict[str, Any]:
    """The row of a fault with what nanhunt proves about it; that of a control as it is."""
    if row["hit"] is None:
        return dict(row)
    made, error = isolated(proofs, path, limit=limit)
    told = {"fix_told": error, "repro_told": error}
    return {**row, **(made or {**dict.fromkeys(PROVED, False), **told})}


def unproved_of(rows: Sequence[Mapping[str, Any]], name: str) -> pd.DataFrame:
    """The faults of which there is no proven fix, or no script that shows them, and why."""
    without = {row["id"]: row[f"{name}_told"] for row in rows if row.get(name) is False}
    return pd.DataFrame({"why": without}).rename_axis(f"no {name}")
