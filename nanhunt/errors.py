"""Errors raised on purpose.

Each one is a sentence that names what was wrong, the value that came and what would work. The
command line prints that sentence and exits with code 2; nothing else is ever caught there.

::

    NanhuntError              something that nanhunt refuses, in one sentence
    ├── UsageError            a word of the command line or an argument that means nothing
    ├── SubjectError          the subject cannot be found, built or run
    ├── StoreError            a saved report cannot be read or written
    ├── CapsuleError          a capsule cannot be read or written, or does not fit a subject
    └── NonFiniteError        what `detect` and `watch` raise; its message is a short report
"""

from typing import Any, ClassVar


class NanhuntError(Exception):
    """Base of every error that nanhunt raises on purpose; `slug` names its kind for programs."""

    slug: ClassVar[str] = "nanhunt"


class UsageError(NanhuntError):
    """A word of the command line, or an argument, that means nothing here."""

    slug = "usage"


class SubjectError(NanhuntError):
    """The subject cannot be found, built or run."""

    slug = "subject"


class StoreError(NanhuntError):
    """A saved report cannot be read, or a report cannot be saved."""

    slug = "store"


class CapsuleError(NanhuntError):
    """A capsule cannot be read or written, or does not fit the subject that it is opened with."""

    slug = "capsule"


class NonFiniteError(NanhuntError):
    """A non-finite value matters; the message is the short report, `report` the whole one."""

    slug = "nonfinite"

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report
