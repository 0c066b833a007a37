"""What the commands share of a terminal: its width, what is going on, files that can be written."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nanhunt.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console


def check_folder(option: str, path: Path | None) -> None:
    """Refuse before the work what could not be written after it."""
    if path is not None and not path.absolute().parent.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {path.parent}; make it first")
    if path is not None and path.is_dir():
        raise UsageError(f"{option} {path} is a folder; name a file in it")


def wide_console() -> "Console":
    """Standard output; where that is no terminal, 100 columns."""
    from rich.console import Console

    with contextlib.suppress(AttributeError, ValueError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    return Console(width=None if sys.stdout.isatty() else 100, soft_wrap=False)


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
