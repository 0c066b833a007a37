"""From a stop of the walk to a finding: which op, on which line, why, on what evidence."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import isfinite

from nanhunt.analysis.origins import Origins
from nanhunt.analysis.walk import Stop, Walk, is_received, walk_back, way_to_sink
from nanhunt.causes import Circumstance, base_name, figure, known_cause, matrices_or_samples
from nanhunt.records import (
    Ancestor,
    Birth,
    Finding,
    Frame,
    Inquiry,
    Operand,
    OpEvent,
    Phase,
    Sink,
    Spectrum,
    Step,
    TensorFacts,
    Trace,
)

NOTHING_ASKED = Inquiry()


@dataclass(frozen=True, slots=True)
class Suspect:
    """One line of code whose births reach the sinks, and the events in which it made them."""

    finding: Finding
    events: tuple[OpEvent, ...] = ()
    origin: OpEvent | None = None

    @property
    def call(self) -> OpEvent | None:
        """The op that the user called: the one behind a backward, unless the user wrote that.

        Their own lines run in the backward of a custom Function and in a hook.
        """
        if not self.events:
            return None
        event = self.events[0]
        is_own = self.finding.node is not None and event.frame is not None
        return event if is_own or self.origin is None else self.origin


def find_suspects(trace: Trace, *, samples: int | None = None) -> tuple[Suspect, ...]:
    """Everyone whose non-finite values reach the sinks of a batch of `samples`, in order of time.

    Empty when every sink is finite, and also when no way back from the sinks leads to an op: that
    is unexplained, not healthy. Several suspects need not be several culprits: what one of them
    made may have been masked on the way. Replays with repairs tell.
    """
    walk = walk_back(trace)
    if walk is None:
        return ()
    origins = Origins(trace)
    lines: dict[object, list[OpEvent]] = {}
    suspects = [Suspect(_data_finding(trace, walk, s)) for s in walk.stops if s.event is None]
    for event in (stop.event for stop in walk.stops if stop.event is not None):
        origin = origins.of(event)
        lines.setdefault((event.phase, origin.op, origin.frame, origin.module), []).append(event)
    for events in lines.values():
        finding = _op_finding(trace, walk, events[0], samples, origins)
        suspects.append(Suspect(finding, tuple(events), origins.of(events[0])))
    return tuple(suspects)


def explain(
    trace: Trace, suspect: Suspect, inquiry: Inquiry, *, samples: int | None = None
) -> Finding:
    """The finding of a suspect anew, with what an inquiry about it told."""
    walk = walk_back(trace)
    if walk is None or not suspect.events:
        return suspect.finding
    return _op_finding(trace, walk, suspect.events[0], samples, Origins(trace), inquiry)


def find_culprits(trace: Trace, *, samples: int | None = None) -> tuple[Finding, ...]:
    """The first suspect, which is the culprit unless a replay with repairs tells otherwise."""
    return tuple(suspect.finding for suspect in find_suspects(trace, samples=samples)[:1])


def _data_finding(trace: Trace, walk: Walk, stop: Stop) -> Finding:
    sink = stop.state or Sink("captured", "a tensor", trace.sinks[0].facts)
    kinds = {"batch": "input", "optimizer": "optimizer state", "captured": "input"}
    where = f"first at index {list(sink.where)}" if sink.where else "it is a single number"
    before = "backward" if sink.kind == "gradient" else "step"
    op = kinds.get(sink.kind, sink.kind)
    circumstance = Circumstance("data", op, None, "", "", None, is_unwritten=sink.is_unwritten)
    cause = known_cause(circumstance)
    return Finding(
        phase="data",
        op=circumstance.op,
        module=sink.name.rpartition(".")[0] if sink.kind in ("parameter", "buffer") else "",
        cause=cause.slug if cause else None,
        dtype=sink.facts.dtype,
        evidence=(
            (
                f"{sink.name} {list(sink.facts.shape)} holds {_counts(sink)} before the {before}, "
                f"{where}"
            ),
        ),
        explanation=cause.reason(circumstance) if cause else "",
        recipes=cause.recipes if cause else (),
        step=walk.step,
        where=_WHERE.get(sink.kind, "{}").format(sink.name),
        poisoned=_poisoned(walk),
    )


_WHERE = {"parameter": "param:{}", "buffer": "buffer:{}"}


def _counts(sink: Sink) -> str:
    facts = sink.facts
    counts = (("NaN", facts.nan), ("+inf", facts.posinf), ("-inf", facts.neginf))
    return ", ".join(f"{count} {name}" for name, count in counts if count)


def _op_finding(
    trace: Trace,
    walk: Walk,
    event: OpEvent,
    samples: int | None,
    origins: Origins,
    inquiry: Inquiry = NOTHING_ASKED,
) -> Finding:
    # What a collective brought was not made by the node in whose backward it ran.
    is_from_here = not _by_engine(event) and not is_received(event)
    in_node = event.phase == "backward" and event.node is not None and is_from_here
    has_own_line = in_node and event.frame is not None and not _is_custom(event)
    if _by_engine(event) and event.frame is None:
        origin = _receiver(trace, walk, event, origins)
    else:
        origin = origins.of(event) if in_node and not has_own_line else event
    op = _name(event, origin) if in_node and not has_own_line else event.op
    frame = (origin.caller or origin.frame) if _is_custom(event) else origin.frame
    phase, on_gradients = _phase(trace, walk, event), _is_on_gradients(walk, event)
    way = way_to_sink(trace, walk, event)
    birth = event.birth and replace(event.birth, by_engine=_by_engine(event))
    circumstance = Circumstance(
        phase=event.phase if event.phase == "backward" else phase,
        op=op,
        node=event.node if in_node else None,
        formula_op=event.op,
        dtype=event.dtype,
        birth=birth,
        after=_nodes_before(trace, event, origin),
        samples=samples,
        output=event.outputs[event.birth.output] if event.birth else None,
        turned_by=_turned_by(way),
        is_hook=on_gradients or (in_node and has_own_line),
        is_asked=event.asked,
        is_kept_nan=not any(facts.posinf or facts.neginf for facts in event.inputs),
        inquiry=inquiry,
    )
    cause = known_cause(circumstance)
    number = event.number if in_node else origin.made
    return Finding(
        phase=phase,
        op=op,
        node=circumstance.node,
        formula_op=event.op if in_node else None,
        file=frame.file if frame else None,
        line=frame.line if frame else None,
        function=frame.function if frame else None,
        module=origin.module,
        terms=trace.owners.get(number, ()) if number is not None else (),
        cause=cause.slug if cause else None,
        dtype=event.dtype,
        occurrence=_occurrence(trace, origin),
        step=event.step,
        evidence=(*_evidence(event, samples), *_ancestry(event, inquiry)),
        explanation=cause.reason(circumstance) if cause else "",
        recipes=cause.recipes if cause else (),
        path=_path(way, origins),
        poisoned=_poisoned(walk),
    )


def _turned_by(way: Iterable[OpEvent]) -> str | None:
    """The op on the way to the sink that made NaN out of infinities."""
    for event in way:
        given, made = (sum(f.nan for f in facts) for facts in (event.inputs, event.outputs))
        if event.parents and not given and made:
            return base_name(event.op)
    return None


def _phase(trace: Trace, walk: Walk, event: OpEvent) -> Phase:
    """When it happened; a backward that the loss itself runs is part of the forward.

    What runs after a backward and writes to its gradients, a clipping by hand, is part of that.
    """
    if event.step == walk.step and (walk.phase, event.phase) == ("forward", "backward"):
        return "forward"
    if _is_on_gradients(walk, event):
        return "backward"
    return "optimizer" if _is_update(trace, walk, event) else event.phase


def _is_update(trace: Trace, walk: Walk, event: OpEvent) -> bool:
    """Whether an op after the backward wrote to a parameter, outside of an optimizer's own step."""
    if event.step != walk.step or (walk.phase, event.phase) != ("optimizer", "forward"):
        return False
    later = (e.phase for e in trace.events[event.index :] if e.step == event.step)
    return "backward" not in later and any(
        e.phase == "backward" for e in trace.events[: event.index] if e.step == event.step
    )


def _is_on_gradients(walk: Walk, event: OpEvent) -> bool:
    """Whether an op outside of the backward made a gradient non-finite that it was given.

    A forward op never reaches a gradient but through nodes, which hold what they read of it.
    """
    return event.step == walk.step and (walk.phase, event.phase) == ("backward", "forward")


def _receiver(trace: Trace, walk: Walk, event: OpEvent, origins: Origins) -> OpEvent:
    """The forward op whose result was used several times: it receives the sum of the gradients."""
    later = (trace.events[i] for i in sorted(walk.visited) if i > event.index)
    took = next((e for e in later if event.index in e.parents and e.number is not None), None)
    return origins.of(took) if took is not None else event


def _by_engine(event: OpEvent) -> bool:
    # What a user's own backward adds is written in it.
    is_written = _is_custom(event) and event.frame is not None
    return event.birth is not None and event.birth.by_engine and not is_written


def _is_custom(event: OpEvent) -> bool:
    """Whether a user's `autograd.Function` is at work: the nodes of torch end in a number."""
    return event.node is not None and event.node.endswith("Backward") and not event.in_hook


def _name(event: OpEvent, origin: OpEvent) -> str:
    if _is_custom(event) and event.node is not None:
        return f"custom:{event.node.removesuffix('Backward')}"
    return origin.op


def _nodes_before(trace: Trace, event: OpEvent, origin: OpEvent) -> tuple[str, ...]:
    """Names of the nodes that ran before a backward event and whose forward came after its own.

    They are what the program did with the result of the guilty op.
    """
    if event.phase != "backward":
        return ()
    names = (
        e.node
        for e in trace.events[: event.index]
        if e.phase == "backward"
        and e.node is not None
        and e.number is not None
        and (origin.made is None or e.number > origin.made)
    )
    return tuple(dict.fromkeys(names))


def _occurrence(trace: Trace, origin: OpEvent) -> int:
    """The how-manieth run of this op on this line the culprit is, from 1."""
    same = (
        e.index
        for e in trace.events[: origin.index + 1]
        if e.op == origin.op and e.frame == origin.frame and e.phase == origin.phase
    )
    return max(sum(1 for _ in same), 1)


def _poisoned(walk: Walk) -> tuple[tuple[str, int, int], ...]:
    groups: dict[str, int] = {}
    for sink in walk.sinks:
        if sink.kind == "gradient":
            groups[sink.group] = groups.get(sink.group, 0) + 1
    return tuple((group, count, count) for group, count in groups.items())


def _path(way: tuple[OpEvent, ...], origins: Origins) -> tuple[Step, ...]:
    """One station per line and module on the way, in order."""
    steps: list[Step] = []
    seen: set[tuple[str, Frame | None]] = set()
    for event in way:
        if event.phase == "backward" and base_name(event.op) == "add":
            continue  # the engine's own fan-out: it runs under the neighbour's node
        origin = origins.of(event)
        place = (origin.module, origin.frame)
        if place not in seen and (origin.frame is not None or origin.module):
            seen.add(place)
            steps.append(Step(origin.op, event.node, origin.module, origin.frame))
    return tuple(steps)


# -- evidence: what was measured, in words ---------------------------------------------------------


def _evidence(event: OpEvent, samples: int | None) -> Iterator[str]:
    birth = event.birth
    if is_received(event):
        yield "what this rank gave to the collective was finite, and what came back was not"
    if birth is None:
        yield from _kept_value(event)
        return
    facts = event.outputs[birth.output]
    if birth.spectrum is not None:
        unit = matrices_or_samples(birth.spectrum, samples)
        yield from _spectrum_evidence(birth.spectrum, unit)
    made = {"nan": "NaN", "inf": "infinite", "nan and inf": "NaN or infinite"}[birth.kind]
    spread = ""
    if birth.samples is not None and len(facts.shape) > 1:
        unit = "samples" if facts.shape[0] == samples else "entries of the first dimension"
        spread = f", in {birth.samples} of {facts.shape[0]} {unit}"
    first = f", first at {list(birth.indices[0])}" if birth.indices and facts.shape else ""
    yield (
        f"{base_name(event.op)} returned {birth.count} {made} of {_elements(facts)} "
        f"{list(facts.shape)}{spread}{first}"
    )
    said: set[tuple[float, ...]] = set()
    for operand in birth.operands:
        kept = operand.role.startswith("saved")
        is_news = operand.at_zero is not None and operand.at not in said
        if not kept or (birth.spectrum is None and is_news):
            yield _operand_evidence(event, operand, birth)
            said.add(operand.at)
    if birth.scalars and (not birth.operands or not all(isfinite(v) for _, v in birth.scalars)):
        yield "arguments: " + ", ".join(f"{name} = {value:g}" for name, value in birth.scalars)


def _spectrum_evidence(spectrum: Spectrum, unit: str) -> Iterator[str]:
    yield (
        f"{spectrum.tied} of {spectrum.matrices} {unit}: bit-identical values among the "
        f"{spectrum.size} that the call returned (up to {spectrum.largest_tie} equal), smallest "
        f"gap {spectrum.smallest_gap:.3g}"
    )
    yield (
        f"rank: {spectrum.above_floor} of {spectrum.size} values stand above the floor "
        f"{spectrum.floor:.3g}, which is null space plus loading; the largest is "
        f"{spectrum.largest:.3g}"
    )


def _ancestry(event: OpEvent, inquiry: Inquiry) -> Iterator[str]:
    """Where the operands came from, and what became of the result."""
    for role, chain in inquiry.lineage:
        made = [a for a in chain if a.op]
        if not made or chain[0].value not in (0.0, 1.0, -1.0):
            continue
        names = " ← ".join(_told(ancestor) for ancestor in made[:_CHAIN])
        name = _ROLES.get((base_name(event.op), role), role.replace("aten::", ""))
        yield f"{name} there is {chain[0].value + 0.0:g}: {names}"  # 0 and not -0
    if inquiry.removed_by is not None and inquiry.result is not None:
        yield (
            f"in the forward the result was {inquiry.result:.4g} there, and "
            f"{base_name(inquiry.removed_by)} took it out"
        )


_CHAIN = 4  # ops of a lineage that are quoted


def _told(ancestor: Ancestor) -> str:
    numbers = [f"{value + 0.0:.4g}" for _, value in ancestor.operands]
    numbers += [f"{name} = {value:g}" for name, value in ancestor.scalars]
    return f"{base_name(ancestor.op)}({', '.join(numbers)})"


_ROLES = {("div", "self"): "dividend", ("div", "other"): "divisor"}


def _operand_evidence(event: OpEvent, operand: Operand, birth: Birth) -> str:
    """One line on an operand: its values at the offending elements, else its range."""
    role = _ROLES.get((base_name(event.op), operand.role), operand.role)
    if operand.at_zero is None:
        if operand.smallest is None:
            return f"{role}: {list(operand.facts.shape)} {operand.facts.dtype}"
        return f"{role}: {operand.smallest:.4g} to {operand.largest:.4g}"
    if operand.at_zero == birth.count:
        return f"{role}: exactly 0 at {'all of them' if birth.count > 1 else 'that element'}"
    quoted = ", ".join(dict.fromkeys(map(figure, operand.at)))
    zeros = f", exactly 0 at {operand.at_zero} of {birth.count}" if operand.at_zero else ""
    return f"{role}: {quoted} there{zeros}"


def _kept_value(event: OpEvent) -> Iterator[str]:
    kept = ", kept from the forward," if event.phase == "backward" else ""
    for position, facts in enumerate(event.inputs):
        if not facts.is_finite:
            yield (
                f"input {position} of {base_name(event.op)}{kept} holds {facts.nonfinite} "
                f"non-finite of {_elements(facts)}"
            )


def _elements(facts: TensorFacts) -> str:
    return f"{facts.numel} element{'' if facts.numel == 1 else 's'}"
