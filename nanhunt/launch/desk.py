"""The desk, where findings are told: on stderr, in a file, and as the end of the program."""

import contextlib
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from nanhunt import store
from nanhunt.errors import StoreError
from nanhunt.records import Report
from nanhunt.report.short import tell

FOUND = 1  # the exit code of a program with findings
_REMARKS = 5  # about single steps; the others are only counted


@dataclass(frozen=True, slots=True)
class Order:
    """What the user asked of a run."""

    mode: Literal["light", "full"] = "light"
    out: Path = Path("nanhunt-out")
    keep_going: bool = False
    after_step: int = 0
    quiet: int = 200  # optimizer steps without a failure after which the recorder goes
    name: str = "program"  # of the files
    command: str = ""  # that repeats the run


class Desk:
    """Tells each distinct culprit once."""

    def __init__(self, order: Order) -> None:
        self._order = order
        # Relative to where the program was started, also if it goes elsewhere.
        self._folder = order.out.absolute()
        self._told: set[object] = set()
        self._is_writable = True
        self._remarks = 0
        rank = os.environ.get("RANK", "")  # as torchrun gives it to each of its processes
        self._rank = rank if rank.isdecimal() else ""
        self._head = f"nanhunt, rank {rank}" if self._rank else "nanhunt"

    @property
    def found(self) -> int:
        """Number of distinct findings."""
        return len(self._told)

    def say(self, text: str) -> None:
        """One remark on stderr; a program may have closed it."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            # in one piece: other processes write there too
            print(f"{self._head}: {text}\n", end="", file=sys.stderr, flush=True)  # noqa: T201

    def remark(self, text: str) -> None:
        """Say something about a single step, unless much was said already."""
        self._remarks += 1
        if self._remarks <= _REMARKS:
            is_last = self._remarks == _REMARKS
            self.say(text + ("; more of this is only counted" if is_last else ""))

    def deliver(self, report: Report, *, when: str, aloud: bool = True) -> bool:
        """Tell a report unless it was told already; whether it is new.

        It is only taken note of where it is not to be told aloud: another process does that.
        """
        first = report.culprits[0] if report.culprits else None
        key: object = report.headline
        if first is not None:
            key = (first.phase, first.op, first.file, first.line, first.module, first.where)
        # What came from another rank, which has told its culprit once and is silent now.
        is_echo = bool(report.ranks) and all(row.state != "culprit" for row in report.ranks)
        if key in self._told or (is_echo and self._told):
            return False
        self._told.add(key)
        if not aloud:
            return True
        whole = replace(
            report,
            command=self._order.command,
            notes=(f"seen while it ran, {when}", *report.notes[1:]),
        )
        path = self._write(whole)
        # The step of a finding is told by `when`, since this was no block.
        shown = replace(whole, culprits=tuple(replace(c, step=0) for c in whole.culprits))
        hint = f"\n  more      nanhunt show {path}" if path else ""
        self.say(f"culprit {when}\n{tell(shown)}{hint}")
        return True

    def end(self) -> None:
        """End the program, unless it is to go on."""
        if not self._order.keep_going:
            sys.exit(FOUND)

    def _write(self, report: Report) -> str:
        """Save the report under the next free name; the name, or nothing where that fails."""
        if not self._is_writable:
            return ""
        # What a rank tells alone has it in the name; a merged report is that of all ranks.
        is_alone = self._rank and not report.ranks
        stem = f"{self._order.name}-rank{self._rank}" if is_alone else self._order.name
        number = 1
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            while (path := self._folder / f"{stem}-{number}.json").exists():
                number += 1
            store.save(report, path)
        except (OSError, StoreError) as error:
            self._is_writable = False
            self.say(f"no report can be written to {self._order.out}: {error}")
            return ""
        return os.path.relpath(path)
