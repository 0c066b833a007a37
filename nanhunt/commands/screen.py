"""What the commands share of a terminal: its width, what is going on, files that can be written."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nanhunt.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console


def check_folder(option: str, path: Path | None) -> None:
    """Refuse before the work what could not be written after it."""
    if path is None:
        return
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder; name a file in it")
    if path.exists() and not path.is_file():
        raise UsageError(f"{option} {path} is not a regular file; name another one")
    # A file is put in its place in one piece, so the folder must take a new one.
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {path}: the folder {folder} is not writable; name another one")


def wide_console() -> "Console":
    """Standard output; where that is no terminal, 100 columns or as many as `COLUMNS` says."""
    from rich.console import Console

    with contextlib.suppress(AttributeError, ValueError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    is_given = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return Console(width=None if is_given else 100, soft_wrap=False)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], object]]:
    """Say on a terminal's stderr what is being replayed; nothing where nobody watches."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("nanhunt") as status:
        yield lambda text: status.update(f"nanhunt · {text}")
