"""The recorder: every aten op of a step, with what it was given and what came out.

`mode` is the dispatch mode and its hot path, `schema` what an op's schema says, `frames` the line
of the user's code, `flow` where non-finite values come from and go to, `evidence` what is read at
the moment one is born, `regions` which views of one storage overlap. Nothing here judges: what a
birth means is decided in `analysis`.
"""

from nanhunt.recorder.flow import storage_key
from nanhunt.recorder.mode import Recorder, Scope, compiled_code_run_eagerly, unrecorded

__all__ = ["Recorder", "Scope", "compiled_code_run_eagerly", "storage_key", "unrecorded"]
