"""The court for a step that is not taken: who did it, who is told, and whether training goes on."""

import math
from dataclasses import replace

from nanhunt.errors import NonFiniteError
from nanhunt.processes import are_several, rank_here
from nanhunt.records import SANITISED
from nanhunt.replay.ends import fingerprint
from nanhunt.watching import telling
from nanhunt.watching.choices import Choices
from nanhunt.watching.held import Held
from nanhunt.watching.inquest import Case, Inquest, name_of
from nanhunt.watching.keeping import Keeping
from nanhunt.watching.moment import Moment, tables_of
from nanhunt.watching.outcome import Outcome
from nanhunt.watching.previous import Kept, Previous
from nanhunt.watching.ranks import Ranks
from nanhunt.watching.running import Part, Running
from nanhunt.watching.scene import PastStep, Scene
from nanhunt.watching.verdict import bad_parameters, tell_parameters, tell_seen


class Court:
    """Hears each failing step of one watch."""

    def __init__(self, choices: Choices, held: Held, previous: Previous | None) -> None:
        self._choices, self._held, self._previous = choices, held, previous
        keeping = Keeping(choices.capsules) if choices.capsules is not None else None
        self._inquest = Inquest(choices, keeping)
        self._ranks = Ranks(choices.model)
        self._shared_keys: set[object] = set()
        self._failures = 0  # in a row

    def acquit(self) -> None:
        """A step was taken."""
        self._failures = 0

    def hear(self, now: Running, last: int | None, *, keeps_gradients: bool = False) -> None:
        """Find out why a step is not finite, and leave all as a skipped step leaves it.

        Args:
            now: the step; its verdict may change by what is found.
            last: the step that was taken last.
            keeps_gradients: whether they are still there afterwards, for a scaler.
        """
        digest = self._digest(now)
        gradients = [p.grad for p in self._held.parameters] if keeps_gradients else []
        self.drop_gradients()
        if now.why != "ranks":
            part = now.failed_part()
            modules = part.call.modules() if part.call is not None else []
            after = Moment(tables_of([self._choices.model, *modules])).take()
            try:
                part.moment.restore()
                with self._ranks.apart(modules):
                    now.case = self._inquire(now, part, last, digest)
            finally:
                after.restore()
                self.drop_gradients()
        if now.case.is_overflow:
            now.why = "scaler"
        elif are_several():
            now.case = self._shared(now)
        for parameter, gradient in zip(self._held.parameters, gradients, strict=False):
            parameter.grad = gradient
        now.rescue_buffers()
        self._note_sanitising(now)

    def _shared(self, now: Running) -> Case:
        """The case as all processes see it; the first one tells it, once for each culprit."""
        case = now.case
        if now.why == "ranks" and self._choices.live_scaler is not None:
            return case  # the others may have left the step to their scalers
        merged = self._ranks.merge(case.report or self._inquest.finite(now.number))
        first = merged.culprits[:1]
        key = (merged.rank, *(name_of(finding) for finding in first))
        is_new = key not in self._shared_keys
        self._shared_keys.add(key)
        return replace(case, report=merged, is_new=is_new and rank_here() == 0)

    @staticmethod
    def _note_sanitising(now: Running) -> None:
        """Say that gradients were cleaned before they were looked at, as a replay has seen."""
        answers = now.case.report.diagnosis if now.case.report is not None else ()
        if any(a.question == "sanitised" and a.answer == "yes" for a in answers):
            now.note(SANITISED)
        elif now.why == "loss" and now.pulse is not None and not now.pulse.bad:
            now.note("the loss is not finite and every gradient is")

    def _inquire(self, now: Running, part: Part, last: int | None, digest: str) -> Case:
        """The case, from the state before the step."""
        pulse = now.pulse
        if pulse is None:
            return Case()
        seen = tell_seen(now.why, pulse, now.number)
        bad = bad_parameters(self._held)
        if bad:
            now.why = "parameters"
            seen = tell_parameters(self._held, bad, now.number, last)
            case = self._inquire_past(seen)
            if case is not None:
                return case
            if last is not None and self._previous is None:
                seen += "; watch(keep_previous=True) replays that step and names the operation"
        if part.call is None:
            bare = self._inquest.bare(now.number, f"{seen}; not replayed: no closure was given")
            return Case(bare, is_new=True)
        size = max(self._choices.accumulate, len(now.parts))
        scene = Scene(self._choices, part.call, part.moment.generators, now.number, size)
        if self._ranks.must_replay_together:
            return self._inquest.hold_together(scene, seen)
        loss = pulse.losses[now.parts.index(part)]
        return self._inquest.hold(scene, seen=seen, loss=loss, fingerprint=digest)

    def _inquire_past(self, seen: str) -> Case | None:
        """Replay the optimizer step that was taken last, where its state was kept."""
        if self._previous is None or self._previous.step is None:
            return None
        if self._ranks.must_replay_together:
            return None  # an optimizer step needs no other process, but its gradients did
        kept = Kept(self._held, self._choices.optimizers)
        try:
            self._previous.restore()
            return self._inquest.hold_on_past(PastStep(self._choices, self._previous), seen)
        finally:
            kept.restore()

    def answer(self, outcome: Outcome, case: Case) -> None:
        """Tell who it was, once, and do as the policy says; everything is in its place by now.

        Raises:
            NonFiniteError: the training is not to go on.
        """
        choices, report = self._choices, case.report
        if outcome.why == "scaler" or (outcome.why == "ranks" and report is None):
            return
        self._failures += 1
        if report is not None and case.is_new:
            if choices.on_report is not None:
                choices.on_report(report)
            else:
                telling.tell(report, outcome.capsule)
        short = telling.tell_shortly(report) if report is not None else str(outcome)
        if choices.policy == "raise":
            raise NonFiniteError(short, report)
        if choices.stop_after is not None and self._failures >= choices.stop_after:
            row = f"stopped: {self._failures} steps in a row were not finite"
            raise NonFiniteError(f"{row}\n{short}", report)

    def drop_gradients(self) -> None:
        """Withhold the step from optimizers: they leave alone what has no gradient."""
        for parameter in self._held.parameters:
            parameter.grad = None

    def mark_gradient(self) -> None:
        """Make one gradient infinite, so that a scaler is sure to skip the step."""
        for gradient in self._held.gradients()[0][:1]:
            gradient.fill_(math.inf)

    def _digest(self, now: Running) -> str:
        """Of loss and gradients, where a replay of one part can have the same."""
        if len(now.losses) != 1 or self._choices.live_scaler is not None:
            return ""
        ours = set(map(id, self._held.parameters))
        if any(p.grad is not None and id(p) not in ours for p in self._choices.model.parameters()):
            return ""  # nobody sets those to 0 before a step
        return fingerprint(now.losses[0], self._choices.model)
