"""The folder that is handed over: its script is run in a clean process, then it is put in place."""

import os
import secrets
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save

from nanhunt.errors import UsageError
from nanhunt.repro.script import MARK, OPERANDS, SCRIPT, WORDS, Pages

# Seconds for the script; importing torch takes a few of them.
LIMIT = 120.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the script did in a process of its own: whether it showed the failure, and its words.

    `works` is None where it did not run to its end; `shown` then says why.
    """

    works: bool | None
    shown: str
    size: int


def check_folder(folder: Path) -> None:
    """Refuse a place where a script cannot be put, before the work.

    Raises:
        UsageError: it is a file, a folder that holds something else, or has no parent.
    """
    if folder.is_dir():
        held = {entry.name for entry in folder.iterdir()}
        if held and not (held <= {SCRIPT, OPERANDS} and _is_ours(folder / SCRIPT)):
            raise UsageError(
                f"the folder {folder} holds something that nanhunt did not write; "
                f"name a new or an empty one"
            )
    elif folder.exists() or folder.is_symlink():
        raise UsageError(f"{folder} is not a folder; name a new or an empty one")
    elif not folder.absolute().parent.is_dir():
        raise UsageError(f"{folder}: there is no folder {folder.parent}; make it first")


def _is_ours(script: Path) -> bool:
    try:
        return MARK in script.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def hand_over(pages: Pages, folder: Path) -> Outcome:
    """Write script and operands, run them, and put them in their place.

    Raises:
        UsageError: they cannot be written there; nothing of them is left then.
    """
    check_folder(folder)
    place = Path(os.path.realpath(folder))
    draft = place.parent / f".nanhunt-{secrets.token_hex(8)}"
    try:
        draft.mkdir()
        text = pages.text.encode("utf-8", "backslashreplace")
        (draft / SCRIPT).write_bytes(text)
        tensors = {name: tensor.contiguous() for name, tensor in pages.tensors.items()}
        (draft / OPERANDS).write_bytes(save(tensors))
        works, shown = _ran(draft)
        size = sum(file.stat().st_size for file in draft.iterdir())
        _put(draft, place)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written ({error.strerror or error}); "
            f"name a folder in one that is writable"
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Outcome(works, shown, size)


def _ran(folder: Path) -> tuple[bool | None, str]:
    """Whether the script shows the failure in a clean process, and what it printed."""
    # Isolated: no path of this process, no user site, no PYTHON* variable.
    words = [sys.executable, "-I", "-W", "ignore", "-B", SCRIPT]
    try:
        ran = subprocess.run(  # noqa: S603 - our own script
            words,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"took longer than {LIMIT:g} s"
    printed = ran.stdout.decode(errors="replace").splitlines()
    if len(printed) >= 2 and WORDS.get(printed[-1]) == ran.returncode:
        return ran.returncode == 0, printed[-2]
    error = ran.stderr.decode(errors="replace").strip().splitlines()
    return None, error[-1] if error else f"ended with exit code {ran.returncode}"


def _put(draft: Path, place: Path) -> None:
    """Put the finished folder in the place of an older one of ours, or of nothing."""
    if not place.exists():
        draft.rename(place)
        return
    old = draft.with_name(f"{draft.name}-old")
    place.rename(old)
    try:
        draft.rename(place)
    except OSError:
        old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)
