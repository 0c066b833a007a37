"""One subject, one variant: the step is run once and everything is put back.

`step` runs it, `objective` reads the loss and its terms, `ends` measures before and after.
"""

from nanhunt.replay.step import INITIAL_SCALE, Replay, blame_terms, replay

__all__ = ["INITIAL_SCALE", "Replay", "blame_terms", "replay"]
