"""The recorder: every aten op of a step, with what it was given and what came out.

`mode` is the dispatch mode and its hot path, `screen` the look at what an op returned, `schema`
what an op's schema says, `frames` the line of the user, `flow` where non-finite values come from,
`given` what an op meets of them, `evidence` what is read when one is born, `regions` which views
overlap, `passing` what passes the modules, `scope` what else is asked for, `whereabouts` where a
thread is. `kept` holds what the ops of one replay were given, `ancestry` where a number is from;
`captured` copies the operands of a few ops. `threads` lets all this go on in the threads of a step,
`eager` runs compiled code as written, `entries` makes the records, `oblivion` lets go of old ones,
`halves` finds ops of the loss in half precision. What a birth means is decided in `analysis`.
"""

from nanhunt.recorder.ancestry import inquire
from nanhunt.recorder.captured import Captured, CapturedCall
from nanhunt.recorder.eager import compiled_code_run_eagerly
from nanhunt.recorder.flow import storage_key
from nanhunt.recorder.frames import Place, call_path
from nanhunt.recorder.halves import LossHalves
from nanhunt.recorder.kept import Kept
from nanhunt.recorder.mode import Recorder
from nanhunt.recorder.passing import unrecorded
from nanhunt.recorder.scope import Scope
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
