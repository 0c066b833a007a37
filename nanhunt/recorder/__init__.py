"""The recorder: every aten op of a step, with what it was given and what came out.

`mode` is the dispatch mode and its hot path, `schema` what an op's schema says, `frames` the line
of the user's code, `flow` where non-finite values come from and go to, `given` what an op meets of
them, `evidence` what is read at the moment one is born, `regions` which views of one storage
overlap.
`kept` holds what the ops of one replay were given, `ancestry` asks it where a number is from.
`captured` copies the operands of the few ops that are asked for.
`threads` lets all this go on in the threads that a step starts, `eager` runs compiled code as it
was written, `entries` makes the records.
`halves` finds the ops of the loss that return half precision, `oblivion` lets go of old events.
Nothing here judges: what a birth means is decided in `analysis`.
"""

from nanhunt.recorder.ancestry import inquire
from nanhunt.recorder.captured import Captured, CapturedCall
from nanhunt.recorder.eager import compiled_code_run_eagerly
from nanhunt.recorder.flow import storage_key
from nanhunt.recorder.frames import Place, call_path
from nanhunt.recorder.halves import LossHalves
from nanhunt.recorder.kept import Kept
from nanhunt.recorder.mode import Recorder, Scope, unrecorded
from nanhunt.recorder.threads import acting_here, carried_into_threads

__all__ = [
    "Captured",
    "CapturedCall",
    "Kept",
    "LossHalves",
    "Place",
    "Recorder",
    "Scope",
    "acting_here",
    "call_path",
    "carried_into_threads",
    "compiled_code_run_eagerly",
    "inquire",
    "storage_key",
    "unrecorded",
]
