"""A folder of capsules that stays within its limits and never disturbs the training."""

import contextlib
import os
import re
import secrets
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from nanhunt.capsule.container import host
from nanhunt.capsule.contents import Capsule
from nanhunt.capsule.record import write_capsule

_NAME = re.compile(r"step-\d+-rank-\d+-[0-9a-f]{8}\.capsule")
_DRAFT = re.compile(r"\.capsule-([0-9a-f]+)-(\d+)-[0-9a-f]+\.part")
# A draft of another machine is taken for a leftover when nobody has written to it for so long.
_STALE = 24 * 3600.0
_IGNORED = "# Capsules hold data of the training.\n*\n"


class CapsuleFolder:
    """Where a training leaves its capsules.

    Args:
        path: the folder; it is made when the first capsule is stored, with a `.gitignore`.
        keep: at most so many capsules stay.
        limit_bytes: at most so many bytes stay. The oldest go first, and the newest never goes.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, keep: int = 5, limit_bytes: int = 4 * 2**30
    ) -> None:
        self.path = Path(path)
        self.keep, self.limit_bytes = keep, limit_bytes
        self.failure = ""  # why the last capsule could not be stored
        self._has_warned = False

    def store(self, capsule: Capsule) -> Path | None:
        """Write a capsule and make room; None where it could not be written.

        A full disk or a folder that is gone is told by one warning, once; the training goes on.
        """
        try:
            self._prepare()
            name = f"step-{capsule.step:08d}-rank-{capsule.rank}-{secrets.token_hex(4)}.capsule"
            written = write_capsule(capsule, self.path / name)
        except Exception as error:  # noqa: BLE001 - whatever it is, the training is worth more
            self._tell(error)
            return None
        self.failure = ""
        with contextlib.suppress(OSError):
            self._make_room(written)
        return written

    def files(self) -> list[Path]:
        """The capsules that are there, the newest first."""
        try:
            found = [path for path in self.path.iterdir() if _NAME.fullmatch(path.name)]
        except OSError:
            return []
        return sorted(found, key=_age, reverse=True)

    def _prepare(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            for draft in self._leftovers():
                draft.unlink(missing_ok=True)
        ignored = self.path / ".gitignore"
        if not ignored.exists():
            ignored.write_text(_IGNORED, encoding="utf-8")

    def _leftovers(self) -> Iterator[Path]:
        """Drafts whose writer was killed."""
        for path in self.path.iterdir():
            draft = _DRAFT.fullmatch(path.name)
            if draft is None:
                continue
            is_ours = draft[1] == host()
            if (is_ours and not _lives(int(draft[2]))) or time.time() - _age(path)[0] > _STALE:
                yield path

    def _make_room(self, newest: Path) -> None:
        """Remove the oldest until count and size are within the limits."""
        others = [path for path in self.files() if path != newest]
        total = _size(newest)
        for count, path in enumerate(others, start=1):
            total += _size(path)
            if count >= self.keep or total > self.limit_bytes:
                path.unlink(missing_ok=True)

    def _tell(self, error: Exception) -> None:
        self.failure = " ".join(str(error).split())
        if self._has_warned:
            return
        self._has_warned = True
        sentence = (
            f"nanhunt could not store a capsule in {self.path}: {self.failure}; the training goes "
            f"on, and further failures are not told"
        )
        try:
            warnings.warn(sentence, RuntimeWarning, stacklevel=3)
        except Warning:  # where warnings are errors, this one is none
            with contextlib.suppress(OSError, ValueError, AttributeError):
                sys.stderr.write(f"{sentence}\n")


def _age(path: Path) -> tuple[float, str]:
    """When it was written; what is gone meanwhile counts as old."""
    try:
        return path.stat().st_mtime, path.name
    except OSError:
        return 0.0, path.name


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
