"""From a culprit to the folder that shows it: capture, choose what to call, reduce, run, tell."""

import platform
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanhunt import measurement
from nanhunt.recorder import Captured
from nanhunt.recorder.schema import op_info
from nanhunt.records import Finding, OpEvent, Reproduction
from nanhunt.replay import Replay, replay
from nanhunt.repro.folder import hand_over
from nanhunt.repro.reduction import Reduced, reduced
from nanhunt.repro.scene import Look, Scene
from nanhunt.repro.script import pages_of
from nanhunt.subject import Subject
from nanhunt.variants import NATIVE

_WIDTH = 96  # of the prose in the script


@dataclass(frozen=True, slots=True)
class Target:
    """The culprit that is to be shown: its finding, and the op that made the value.

    `events` are those of its step, as they were recorded when it was found.
    """

    finding: Finding
    event: OpEvent
    events: Sequence[OpEvent]

    @property
    def index(self) -> int:
        """The index of the event in its step."""
        return self.event.index - self.events[0].index

    @property
    def guess(self) -> frozenset[int]:
        """The indices of the events whose operands are wanted, as they were then."""
        maker = _maker_of(self.event, self.events)
        found = (self.event, maker) if maker is not None else (self.event,)
        return frozenset(event.index - self.events[0].index for event in found)


class _Place(NamedTuple):
    """Where the culprit ran in one replay.

    `maker` is the op that made the node in which it ran: the forward op, or one of a backward that
    is itself differentiated; None where there is none, or it is not known.
    """

    event: OpEvent
    maker: OpEvent | None

    @property
    def indices(self) -> frozenset[int]:
        """Of the events whose operands are wanted."""
        return frozenset(e.index for e in (self.event, self.maker) if e is not None)

    @property
    def is_of_node(self) -> bool:
        """Whether it ran in the formula of one of torch's own nodes."""
        return _is_of_node(self.event)


def _is_of_node(event: OpEvent) -> bool:
    by_engine = event.birth is not None and event.birth.by_engine
    is_custom = event.node is not None and event.node.endswith("Backward")
    return (
        event.phase == "backward"
        and event.number is not None
        and event.frame is None
        and not (by_engine or is_custom)
    )


def reproduce(subject: Subject, batch: Any, target: Target, folder: Path) -> Reproduction:
    """Write a script that shows a culprit with torch alone, and run it.

    Args:
        subject: as it stands before the step; it is left so.
        batch: the batch of the step.
        target: the culprit.
        folder: where the script and its operands are to be.

    Returns:
        What came of it. Where the culprit cannot be called by itself nothing is written, and what
        does not reproduce is written and told as such.

    Raises:
        UsageError: the folder cannot be written.
    """
    place, done = _captured_again(subject, batch, target)
    if place is None or done.captured is None:
        return Reproduction("", works=False, note="the op did not run again in another replay")
    call = done.captured.calls[place.event.index]
    if call.unfit:
        return Reproduction("", works=False, note=f"{call.unfit}: it cannot be saved")
    if op_info(call.func).is_collective:
        told = "other ranks take part in it: it has no call alone"
        return Reproduction("", works=False, note=told)
    chosen = _chosen(place, done.captured)
    if chosen.look is None:
        return Reproduction("", works=False, note=chosen.note)
    return _handed_over(target.finding, place, chosen, done, folder)


def _captured_again(subject: Subject, batch: Any, target: Target) -> tuple[_Place | None, Replay]:
    """Replay the step with the operands of the culprit captured, and tell where it ran there.

    The first replay of a program may run ops that later ones do not (a scaler makes its state when
    it is first used): where the culprit stood elsewhere one more replay captures it there.
    """
    wanted = target.guess
    done = replay(subject, batch, NATIVE, capture=wanted)
    place = _placed(target, done)
    if place is not None and place.indices != wanted:
        done = replay(subject, batch, NATIVE, capture=place.indices)
        again = _placed(target, done)
        place = again if again is not None and again.indices == place.indices else None
    calls = done.captured.calls if done.captured else {}
    if place is None or not place.indices <= set(calls):
        return None, done
    ran = calls[place.event.index].func._schema.name  # noqa: SLF001 - its public name
    return (place if ran == place.event.op else None), done


def _placed(target: Target, done: Replay) -> _Place | None:
    """Where the culprit ran in a replay: at its index, or where the same op returned the same."""
    events = done.trace.events if done.trace else ()
    there = [e for e in events[target.index : target.index + 1] if _mark(e) == _mark(target.event)]
    same = [e for e in (*there, *events) if _mark(e) == _mark(target.event)]
    event = next((e for e in same if e.outputs == target.event.outputs), None)
    if event is None:
        event = there[0] if there else None
    if event is None:
        return None
    return _Place(event, _maker_of(event, events))


def _maker_of(event: OpEvent, events: Sequence[OpEvent]) -> OpEvent | None:
    """The op that made the node in which an event of the backward ran."""
    if not _is_of_node(event):
        return None
    thread = event.made_in or 0
    # A number is shared by the ops after it that make no node: the first one counts.
    makers = (e for e in events if e.made == event.number and e.thread == thread)
    return next((maker for maker in makers if maker.index < event.index), None)


def _mark(event: OpEvent) -> tuple[object, ...]:
    return event.op, event.node, event.frame, event.module


@dataclass(frozen=True, slots=True)
class _Choice:
    """What is to be called: the scene, where its failure shows, and what is to be said of it."""

    scene: Scene
    look: Look | None
    note: str = ""


def _chosen(place: _Place, captured: Captured) -> _Choice:
    """The forward op and the gradient that came to it, where that shows the failure; else the op.

    An op of a formula, called with what it was given, shows its failure as well, only further from
    the user's line.
    """
    note = ""
    if place.is_of_node:
        made_by = place.maker.index if place.maker is not None else -1
        call, gradients = captured.calls.get(made_by), captured.incoming.get(made_by)
        if call is None or call.unfit or not gradients:
            note = "the gradient that came to the forward op could not be captured"
        else:
            scene = Scene.of(call, gradients)
            look = _look_at_gradients(scene, place.event.node)
            if look is not None:
                return _Choice(scene, look)
            note = "the forward op and the gradient that came to it do not show it by themselves"
        note += f": the op of the formula, {_plain(place.event.op)}, is called instead"
    scene = Scene.of(captured.calls[place.event.index])
    look = _look_at(place.event)
    if not scene.is_dense:
        look = replace(look, at=None)  # what is looked at are the values that are stored
    try:
        results = scene.results()
        if look.position < len(results):
            return _Choice(scene, look, note)
        reason = "it returns fewer tensors"
    except Exception as error:  # noqa: BLE001 - whatever the op raises is the answer
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return _Choice(scene, None, f"{_plain(place.event.op)} cannot be called by itself: {reason}")


def _look_at_gradients(scene: Scene, node: str | None) -> Look | None:
    """The first operand whose gradient is not finite, if the op makes the same node again."""
    if not all(g is None or measurement.count(g).is_finite for g in scene.incoming):
        return None
    try:
        args, kwargs = scene.arguments()
        with torch.enable_grad():
            answered = scene.answered(scene.func(*args, **kwargs))
        if not answered or any(o.grad_fn is None or o.grad_fn.name() != node for *_, o in answered):
            return None
        results = scene.results()
        looks = map(Look, range(len(results)))
        return next((k for k in looks if bool(k.mask(results[k.position].tensor).any())), None)
    except Exception:  # noqa: BLE001 - then the op of the formula is called
        return None


def _look_at(event: OpEvent) -> Look:
    """Where the failure of an op shows among its outputs."""
    birth = event.birth
    bad = next((i for i, facts in enumerate(event.outputs) if not facts.is_finite), 0)
    position = birth.output if birth else bad
    given = [facts for facts in event.inputs if not facts.is_finite]
    if not given:
        return Look(position)
    made = event.outputs[position]
    if (birth and birth.from_asked) or (made.nan and not any(facts.nan for facts in given)):
        return Look(position, "nan")
    return Look(position, at=birth.indices[0] if birth and birth.indices else None)


# -- handing it over -------------------------------------------------------------------------------


def _handed_over(
    finding: Finding, place: _Place, choice: _Choice, done: Replay, folder: Path
) -> Reproduction:
    before = sum(t.numel() * t.element_size() for t in choice.scene.named.values())
    small = Reduced(choice.scene, choice.look or Look(0))
    shows = small.look.mask(choice.scene.results()[small.look.position].tensor)
    if bool(shows.any()):
        small = reduced(choice.scene, small.look)
    notes = [choice.note, small.note]
    about = list(_about(finding, place, small, notes))
    outcome = hand_over(pages_of(small.scene, small.look, about), folder)
    if outcome.works is None:
        notes.append(f"the script did not run to its end: {outcome.shown}")
    elif not outcome.works:
        is_shown = "it fails in this process, and in a clean one it is" if bool(shows.any()) else ""
        notes.append(f"{is_shown or 'called alone it is'} finite: {outcome.shown}")
        if any("emulated" in note for note in done.run.notes):
            notes.append("the replay computed FP16 products in FP32, the script does not")
    after = {name: tuple(tensor.shape) for name, tensor in small.scene.named.items()}
    return Reproduction(
        folder=str(folder),
        works=bool(outcome.works),
        shown=outcome.shown if outcome.works else "",
        is_backward=bool(small.scene.incoming),
        bytes=outcome.size,
        bytes_before=before,
        operands=tuple((n, small.shapes.get(n, shape), shape) for n, shape in after.items()),
        note="; ".join(filter(None, notes)),
    )


def _about(finding: Finding, place: _Place, small: Reduced, notes: list[str]) -> Iterator[str]:
    """What the script says of itself."""
    event = place.event
    if small.scene.incoming and place.maker is not None:
        formula = f"{finding.node} → {_plain(event.op)}"
        head = f"{place.maker.op}: its backward ({formula}) returns a gradient that is not finite."
    elif finding.node is not None:
        head = (
            f"{event.op} returns non-finite elements in {finding.node}, the backward of "
            f"{finding.op}."
        )
    else:
        head = f"{event.op} returns non-finite elements."
    yield from textwrap.wrap(head, _WIDTH)
    yield ""
    if finding.file is not None:
        function = f" in {finding.function}" if finding.function else ""
        yield f"Called at {finding.file}:{finding.line}{function}"
    if finding.source:
        yield f"    {finding.source.strip()}"
    yield from textwrap.wrap(finding.explanation, _WIDTH)
    for name, tensor in small.scene.named.items():
        facts = measurement.count(tensor.detach())
        if not facts.is_finite:
            yield f"{name} holds {facts.nonfinite} of {facts.numel} non-finite before the call."
    device = next((str(t.device) for t in small.scene.named.values()), "cpu")
    yield f"torch {torch.__version__}, Python {platform.python_version()}, {device}, {event.dtype}"
    cut = [
        f"{name} {list(tensor.shape)} of {list(small.shapes[name])}"
        for name, tensor in small.scene.named.items()
        if small.shapes.get(name, tuple(tensor.shape)) != tuple(tensor.shape)
    ]
    if cut:
        yield from textwrap.wrap(f"Reduced: {', '.join(cut)}", _WIDTH)
    for note in filter(None, notes):
        yield from textwrap.wrap(f"{note[0].upper()}{note[1:]}.", _WIDTH)


def _plain(op: str) -> str:
    return op.removeprefix("aten::")
