"""Launching: a program from its start to its end, with the sentry beside it."""

import atexit
import os
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanhunt.launch.arrival import Arrival
from nanhunt.launch.desk import FOUND, Desk, Order
from nanhunt.launch.ledger import Ledger
from nanhunt.launch.program import Program, end_at_the_program

if TYPE_CHECKING:
    from nanhunt.launch.sentry import Sentry


@dataclass(frozen=True, slots=True)
class Launch:
    """A program that is to be run, and how it is to be watched."""

    program: Program
    order: Order

    def __call__(self) -> None:
        """Run it to its end: what Python would raise comes through, findings make the exit code 1.

        Nothing must be caught around this call, for Python itself is to see how it ends.
        """
        desk = Desk(self.order)
        watch = _Watch(self.order, desk)
        try:
            self.program.run()
        except SystemExit as error:
            if desk.found and not error.code:
                raise SystemExit(FOUND) from None
            raise
        except BaseException as error:
            end_at_the_program(error)
            raise
        finally:
            watch.note_end()
        if desk.found:
            raise SystemExit(FOUND)


class _Watch:
    """The sentry, from the moment at which torch is there until Python ends."""

    def __init__(self, order: Order, desk: Desk) -> None:
        self._order, self._desk = order, desk
        self._ledger = Ledger()
        self._sentry: Sentry | None = None
        self._process = os.getpid()
        self._arrival = Arrival("torch", self._attach)
        _WATCHES.add(self)
        atexit.register(self._tell_end)  # the first to be registered is the last to be called
        self._arrival.expect()

    def _attach(self) -> None:
        try:
            from nanhunt.launch.sentry import Sentry

            sentry = Sentry(self._order, self._desk, self._ledger)
            sentry.attach()
        except Exception as error:  # noqa: BLE001 - nothing of ours may end the program
            self._ledger.failure = f"{type(error).__name__}: {error}"
            self._desk.say(f"cannot watch, the program goes on alone: {self._ledger.failure}")
            return
        self._sentry = sentry

    def note_end(self) -> None:
        """The program's main thread is over; others may still train."""
        self._arrival.forget()

    def leave(self) -> None:
        """Be gone: in a process that was forked nobody watches."""
        self._arrival.forget()
        if self._sentry is not None:
            self._sentry.leave()

    def _tell_end(self) -> None:
        if os.getpid() != self._process:
            return
        try:
            self.leave()
            self._desk.say(self._ledger.closing())
        except Exception as error:  # noqa: BLE001 - as above
            self._desk.say(f"no account of what was watched: {type(error).__name__}: {error}")


_WATCHES: "weakref.WeakSet[_Watch]" = weakref.WeakSet()


def _leave_all() -> None:
    for watch in tuple(_WATCHES):
        watch.leave()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_all)
