"""The ledger: what was watched of a program, counted, and the line that tells it at the end."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Ledger:
    """Counts of one run."""

    is_attached: bool = False  # torch was imported
    watches_all: bool = False  # the recorder is on from the start
    backwards: int = 0
    steps: int = 0  # that were looked at
    optimizers: dict[str, int] = field(default_factory=dict)  # kind -> how many stepped
    skipped: int = 0  # by a gradient scaler
    withheld: list[int] = field(default_factory=list)  # numbers of steps, from 1
    left_out: int = 0  # by the program itself, with gradients that are not finite
    odd_losses: int = 0  # not finite, with finite gradients
    culprits: int = 0
    unwatched: list[str] = field(default_factory=list)  # what was met and could not be watched
    failure: str = ""  # why nanhunt gave up
    unseen: int = 0  # first steps, that were not to be watched
    has_company: bool = False  # of other processes that train with this one

    @property
    def tried(self) -> int:
        """Steps that there were or would have been: the number of the last one, from 1."""
        return self.unseen + self.steps + self.skipped + self.left_out

    def note_unwatched(self, what: str) -> None:
        """Something was met that cannot be watched; told once."""
        if what not in self.unwatched:
            self.unwatched.append(what)

    def closing(self) -> str:
        """The line at the end: what was watched, what was found, what was not watched."""
        if not self.is_attached:
            return "nothing to watch: torch was never imported in this process"
        parts = [self._watched(), *self._found(), *self._missing()]
        return " · ".join(parts)

    def _watched(self) -> str:
        if not self.tried:
            seen = count(self.backwards, "backward")
            hint = "" if self.watches_all else "; --mode full sees backwards"
            return f"no optimizer of torch.optim stepped ({seen}{hint})"
        kinds = ", ".join(f"{n} {kind}" if n > 1 else kind for kind, n in self.optimizers.items())
        steps = count(self.steps, "optimizer step")
        total = sum(self.optimizers.values())
        text = f"watched {steps} of {count(total, 'optimizer')}" + (f" ({kinds})" if kinds else "")
        if self.watches_all:
            text += f" and {count(self.backwards, 'backward')}, every operation recorded"
        return text + (f", {self.skipped} more skipped by a GradScaler" if self.skipped else "")

    def _found(self) -> list[str]:
        found = []
        if self.withheld:
            first = ", ".join(map(str, self.withheld[:3]))
            first += ", …" if len(self.withheld) > 3 else ""
            found.append(f"{len(self.withheld)} withheld with non-finite gradients (step {first})")
        if self.left_out:
            found.append(
                f"{self.left_out} left out by the program or compiled, with non-finite gradients"
            )
        if self.odd_losses:
            found.append(f"{self.odd_losses} with a non-finite loss and finite gradients")
        if self.culprits:
            found.append(count(self.culprits, "culprit"))
        elif found:
            found.append(
                "no culprit named by this rank"
                if self.has_company
                else "no culprit named: it did not come again while the recorder was on"
            )
        elif not self.failure:
            is_complete = self.steps or (self.watches_all and self.backwards)
            found.append("nothing non-finite" if is_complete else "nothing checked")
        return found

    def _missing(self) -> list[str]:
        if self.failure:
            return [f"then unwatched: {self.failure}"]
        parts = [f"the first {count(self.unseen, 'step')}"] if self.unseen else []
        parts += self.unwatched
        if self.watches_all:
            parts.append("losses that no backward starts from")
        else:
            parts.append("losses and gradients that reach no optimizer step")
        return [f"not watched: {', '.join([*parts, 'other processes'])}"]


def count(number: int, noun: str) -> str:
    """A number and its noun, in the plural where there are several."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
