"""One subject, one variant: the step is run once and everything is put back.

`step` replays it, `drive` takes it from station to station, `objective` reads the loss and its
terms, `ends` measures before and after. `course` takes several steps in a row, for real.
"""

from nanhunt.replay.course import Course, take_steps
from nanhunt.replay.drive import EMULATED, has_scaler
from nanhunt.replay.step import (
    INITIAL_SCALE,
    Change,
    Replay,
    blame_terms,
    draw_batch,
    find_fingerprints,
    replay,
)

__all__ = [
    "EMULATED",
    "INITIAL_SCALE",
    "Change",
    "Course",
    "Replay",
    "blame_terms",
    "draw_batch",
    "find_fingerprints",
    "has_scaler",
    "replay",
    "take_steps",
]
