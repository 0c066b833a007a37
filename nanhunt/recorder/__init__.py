"""The recorder: every aten op of a step, with what it was given and what came out.

`mode` has the hot path, `whereabouts` a thread's node, module and line, `frames` lines of the user,
`schema` what an op's schema says, `screen` the look at what it returned, `deferred` a later look,
`flow` the way of non-finite values, `given` what ops meet of them, `evidence` what births show,
`regions` which views overlap, `passing` what passes modules, `scope` what else is asked for, `kept`
a replay's tensors, `ancestry` where a number is from, `captured` a few operands, `threads` others,
`eager` compiled code as written, `entries` the records, `oblivion` old ones, `halves` the loss's.
"""

from nanhunt.recorder.ancestry import inquire
from nanhunt.recorder.captured import Captured, CapturedCall
from nanhunt.recorder.deferred import Deferred
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
    "Deferred",
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
