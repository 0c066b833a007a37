"""What nanhunt proves about a case, besides naming its culprit.

Each function is given the file of a case and is to be run in a process of its own; it sees the
`Program` and nothing of what is known about it.
"""

import tempfile
from pathlib import Path

from protocol import Program

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
