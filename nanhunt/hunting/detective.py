"""Who it was, and why: the suspects of a native replay, tried by repairs and asked about."""

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanhunt import analysis
from nanhunt.causes import base_name, is_difference
from nanhunt.hunting import repairs
from nanhunt.places import told_finding
from nanhunt.processes import are_several
from nanhunt.recorder import Scope, inquire
from nanhunt.records import Finding, Inquiry, OpEvent, Pace, Run, Trace, Trial
from nanhunt.replay import Change, Replay, replay
from nanhunt.structure import count_samples
from nanhunt.subject import Subject
from nanhunt.trials import CallMode, Lead
from nanhunt.variants import NATIVE, VARIANTS, device_of

CANCELLATION = "cancellation"  # the one cause for which a wider replay is the evidence
# The part of the free memory that a replay which keeps its tensors may fill.
_SHARE = 0.4


@dataclass(slots=True)
class Detective:
    """Finds the culprits of one native replay, and says on `notes` how that was found out."""

    subject: Subject
    batch: Any
    native: Replay
    deterministic: bool | None
    pace: tuple[Pace, ...]
    progress: Callable[[str], object]
    notes: list[str] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    lead: Lead | None = None
    _last: tuple[frozenset[int], Replay] | None = None

    @property
    def _trace(self) -> Trace:
        return self.native.trace or Trace((), ())

    @property
    def _samples(self) -> int | None:
        return count_samples(self.batch)

    def findings(self) -> tuple[Finding, ...]:
        """The culprits in the order of time, each with its cause."""
        trace = self._trace
        suspects = analysis.find_suspects(trace, samples=self._samples)
        if not suspects or not suspects[0].events:
            return self._settled([s.finding for s in suspects[:1]])
        if self.deterministic is False or not repairs.is_replayable(suspects, trace):
            return self._settled([self._explained(trace, suspects[0], Inquiry())])
        decision = repairs.decide(suspects, self._is_cured_by)
        if decision.note:
            self.notes.append(decision.note)
        self.trials.append(self._neutralised(decision.culprits))
        found = self._asked_about(decision.culprits)
        # Parameters that ran away overflow wherever they are read: that is no second fault.
        has_diverged = found[0].cause == "divergence"
        hidden = () if has_diverged else self._hidden_behind(decision.culprits)
        return self._settled([*found, *hidden])

    def _settled(self, findings: Sequence[Finding]) -> tuple[Finding, ...]:
        return tuple(settle(finding, self.native.run) for finding in findings)

    # -- repairs -----------------------------------------------------------------------------

    def _repaired(self, suspects: Collection[analysis.Suspect]) -> Trace:
        """The trace of a replay with some births repaired; the last one is not made twice."""
        chosen = repairs.indices(suspects, self._trace)
        if self._last is None or self._last[0] != chosen:
            self.progress("repaired at birth")
            done = replay(self.subject, self.batch, NATIVE, scope=Scope(repair=chosen))
            self._last = chosen, done
        return self._last[1].trace or Trace((), ())

    def _neutralised(self, culprits: Sequence[analysis.Suspect]) -> Trial:
        """What the step does once nothing non-finite is made there."""
        self._repaired(culprits)
        run = self._last[1].run if self._last else self.native.run
        lines = {f"{f.file}:{f.line}": None for f in (told_finding(c.finding) for c in culprits)}
        return Trial(
            "neutralise",
            "the newborn non-finite elements replaced by finite numbers",
            finite=run.is_finite,
            sites=tuple(lines),
            times=sum(len(c.events) for c in culprits),
            loss=run.loss,
            gradient=math.hypot(*(group.norm for group in run.groups)),
            culprit_after=None,
            seconds=run.seconds,
        )

    def _is_cured_by(self, suspects: Collection[analysis.Suspect]) -> bool:
        return analysis.is_cured(self._trace, self._repaired(suspects))

    def _hidden_behind(self, culprits: Sequence[analysis.Suspect]) -> Sequence[Finding]:
        """A fault of a later phase, which the sinks of an earlier one had hidden."""
        if culprits[0].finding.phase == "optimizer":
            return ()
        repaired = self._repaired(culprits)
        if not analysis.is_cured(self._trace, repaired):
            return ()
        lines = {(c.finding.file, c.finding.line) for c in culprits}
        behind = analysis.find_suspects(repaired, samples=self._samples)
        # The slope of the very op that was repaired is no second fault, nor is what follows from an
        # infinity that was let stand.
        return [
            s.finding
            for s in behind
            if (s.finding.file, s.finding.line) not in lines
            and all(e.birth is not None and not e.parents for e in s.events)
        ][:1]

    # -- inquiries ---------------------------------------------------------------------------

    def _asked_about(self, culprits: Sequence[analysis.Suspect]) -> list[Finding]:
        """Replay once more with all tensors kept, and ask them about each culprit."""
        self.progress("where the operands are from")
        given = self._trace.events[repairs.first_of_step(self._trace) :]
        calls = CallMode()
        done = replay(
            self.subject,
            self.batch,
            NATIVE,
            scope=Scope(keep=_budget(self.subject)),
            change=Change(calls.entered),
        )
        events = done.trace.events if done.trace else ()
        found = []
        for suspect in culprits:
            event, origin = suspect.events[0], suspect.origin or suspect.events[0]
            here, there = _again(event, given, events), _again(origin, given, events)
            inquiry = Inquiry()
            if done.kept is not None and here is not None and there is not None:
                # A step may run several backwards: what counts is the forward after the origin.
                ends = (e.index for e in events[there.index :] if e.phase == "backward")
                inquiry = inquire(done.kept, here, there, next(ends, len(events)))
            found.append(self._explained(self._trace, suspect, inquiry))
            called = _again(suspect.call or event, given, events)
            if self.lead is None and called is not None:
                chains = (ancestor for _, chain in inquiry.lineage for ancestor in chain)
                makers = (events[a.event] for a in chains if a.event is not None)
                upstream = [calls.around(maker)[:1] for maker in makers]
                sites = tuple(site for around in upstream for site in around)
                self.lead = Lead(found[0], calls.around(called), sites)
        return found

    def _explained(self, trace: Trace, suspect: analysis.Suspect, inquiry: Inquiry) -> Finding:
        more = replace(inquiry, growth=self._growth())
        inside = self._inside(suspect.finding)
        if inside is not None:
            overflow = (inside.cause or "").startswith("overflow")
            more = replace(more, inner=inside.op, is_inner_overflow=overflow)
        if is_difference(more):
            # Worth a replay only where the answer decides.
            supposed = replace(more, is_gone_in_fp64=True)
            found = analysis.explain(trace, suspect, supposed, samples=self._samples)
            if found.cause != CANCELLATION:
                return found
            more = replace(more, is_gone_in_fp64=self._is_gone_in_fp64())
        return analysis.explain(trace, suspect, more, samples=self._samples)

    def _growth(self) -> float | None:
        if len(self.pace) < 2 or not self.pace[0].largest:
            return None
        return self.pace[-1].largest / self.pace[0].largest

    def _is_gone_in_fp64(self) -> bool | None:
        if are_several():  # a parameter that changes its dtype loses the hook that shares gradients
            return None
        self.progress("fp64")
        return replay(self.subject, self.batch, VARIANTS["fp64"], scope=None).run.is_finite

    def _inside(self, finding: Finding) -> Finding | None:
        """The culprit inside of fused attention, found by a replay with its formula written out."""
        if "scaled_dot_product" not in finding.op:
            return None
        self.progress("attention by its formula")
        with sdpa_kernel(SDPBackend.MATH):
            done = replay(self.subject, self.batch, NATIVE)
        found = analysis.find_culprits(done.trace, samples=self._samples) if done.trace else ()
        if not found:
            self.notes.append("with attention written out (math backend) the step is finite")
            return None
        self.notes.append(
            f"with attention written out (math backend) the first non-finite value is made by "
            f"{base_name(found[0].op)}: {found[0].evidence[0] if found[0].evidence else ''}"
        )
        return found[0]


def _again(event: OpEvent, given: Sequence[OpEvent], events: Sequence[OpEvent]) -> OpEvent | None:
    """The same op in another replay of the step.

    Counts among its like tell it: autograd detaches more tensors where others hold them, so that
    the index of an event differs.
    """
    like = [e for e in given if _likeness(e) == _likeness(event)]
    others = [e for e in events if _likeness(e) == _likeness(event)]
    if event not in like or len(like) != len(others):
        return None
    return others[like.index(event)]


def _likeness(event: OpEvent) -> tuple[object, ...]:
    return event.phase, event.op, event.node, event.module, event.frame


def _budget(subject: Subject) -> int:
    """Bytes that a replay may keep."""
    if device_of(subject.model) == "cuda":
        return int(_SHARE * torch.cuda.mem_get_info()[0])
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return int(_SHARE * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return 2**31


def settle(finding: Finding, run: Run) -> Finding:
    """Give a finding its source line, readable paths and the size of each poisoned group."""
    sizes: Mapping[str, int] = {g.name: g.parameters - g.without_gradient for g in run.groups}
    poisoned = tuple((name, n, sizes.get(name, n)) for name, n, _ in finding.poisoned)
    return replace(told_finding(finding), poisoned=poisoned)
