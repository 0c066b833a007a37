"""The step that is running: its micro-batches, and what is known of it so far."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from nanhunt.records import Why
from nanhunt.watching.call import Call
from nanhunt.watching.drift import Drift
from nanhunt.watching.held import Held
from nanhunt.watching.inquest import Case
from nanhunt.watching.moment import Moment
from nanhunt.watching.outcome import Outcome
from nanhunt.watching.pulse import Pulse


@dataclass(slots=True)
class Part:
    """One micro-batch: its call, the moment before it, and what it left on the device."""

    call: Call | None
    moment: Moment
    loss: Tensor | None = None
    flag: Tensor | None = None


@dataclass(slots=True)
class Running:
    """One step from its first forward to its end."""

    number: int
    parts: list[Part] = field(default_factory=list)
    pulse: Pulse | None = None
    why: Why = ""
    case: Case = field(default_factory=Case)
    notes: tuple[str, ...] = ()
    clipped: float | None = None
    drift: Drift | None = None
    rates: tuple[float, ...] = ()

    @property
    def losses(self) -> list[Tensor]:
        """Of the micro-batches, on the device."""
        return [part.loss for part in self.parts if part.loss is not None]

    @property
    def flags(self) -> list[Tensor]:
        """What was left after each of them but the last."""
        return [part.flag for part in self.parts if part.flag is not None]

    def failed_part(self) -> Part:
        """The micro-batch in which something first was not finite."""
        index = self.pulse.first_bad if self.pulse is not None else 0
        return self.parts[min(index, len(self.parts) - 1)]

    def note(self, sentence: str) -> None:
        """Add a sentence for the outcome."""
        self.notes = (*self.notes, sentence)

    def rescue_buffers(self) -> None:
        """Put the buffers back if the forward made one of them non-finite."""
        first = self.parts[0].moment
        if not first.are_buffers_finite() and first.is_finite():
            first.restore_buffers()
            self.note("the forward made a buffer non-finite: all buffers are as before the step")

    def outcome(self, held: Held, *, stepped: bool, scheduled: bool | None) -> Outcome:
        """What is known, for the training loop."""
        pulse, case = self.pulse, self.case
        if pulse is None:
            return Outcome(self.number, why=self.why, notes=self.notes)
        norms: Mapping[str, float] = held.by_group(pulse.norms, pulse.positions)
        return Outcome(
            self.number,
            loss=sum(pulse.losses) / len(pulse.losses),
            norms=norms,
            norm=pulse.norm,
            stepped=stepped,
            why=self.why,
            scale=pulse.scale,
            clipped=self.clipped,
            scheduled=scheduled,
            report=case.report,
            capsule=case.capsule,
            notes=self.notes,
        )
