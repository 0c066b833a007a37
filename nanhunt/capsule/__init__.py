"""A failing step on disk: read without executing anything, replayed where it is wanted.

`contents` says what is in one, `moment` reads it from the live objects, `spelling` and `reading`
turn a batch into JSON and back, `memory` keeps strides and aliases, `container` is the file,
`record` joins them, `folder` keeps several within limits, `fitting` puts one into a subject.
"""

from nanhunt.capsule.contents import Absent, Capsule, Settings
from nanhunt.capsule.fitting import open_capsule, unused
from nanhunt.capsule.folder import CapsuleFolder
from nanhunt.capsule.machine import read_machine, tell_difference
from nanhunt.capsule.moment import capture
from nanhunt.capsule.record import read_capsule, write_capsule
from nanhunt.capsule.switches import read_settings, settings_applied

__all__ = [
    "Absent",
    "Capsule",
    "CapsuleFolder",
    "Settings",
    "capture",
    "open_capsule",
    "read_capsule",
    "read_machine",
    "read_settings",
    "settings_applied",
    "tell_difference",
    "unused",
    "write_capsule",
]
