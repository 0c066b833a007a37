"""From a culprit to the folder that shows it: capture, choose what to call, reduce, run, tell."""

import platform
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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

    `maker` is the op that made the node in which it ran: the forward op, or one of a backward that
    is itself differentiated; None where there is none, or it is not known. `start` is the index of
    the first event of the step.
    """

    finding: Finding
    event: OpEvent
    maker: OpEvent | None
    start: int

    @property
    def is_of_node(self) -> bool:
        """Whether it ran in the formula of one of torch's own nodes."""
        event = self.event
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
    places = {"event": target.event.index - target.start}
    if target.is_of_node and target.maker is not None:
        places["maker"] = target.maker.index - target.start
    done = replay(subject, batch, NATIVE, capture=frozenset(places.values()))
    captured = done.captured
    if captured is None or not _is_again(target, places, done):
        return Reproduction("", works=False, note="the op did not run again in another replay")
    call = captured.calls[places["event"]]
    if call.unfit:
        return Reproduction("", works=False, note=f"{call.unfit}: it cannot be saved")
    if op_info(call.func).is_collective:
        return Reproduction(
            "", works=False, note="other ranks take part in it: it has no call alone"
        )
    chosen = _chosen(target, places, captured)
    if chosen.look is None:
        return Reproduction("", works=False, note=chosen.note)
    return _handed_over(target, chosen, done, folder)


def _is_again(target: Target, places: Mapping[str, int], done: Replay) -> bool:
    """Whether the ops that were captured are those of the culprit."""
    events = done.trace.events if done.trace else ()
    for name, index in places.items():
        wanted = target.maker if name == "maker" else target.event
        call = done.captured.calls.get(index) if done.captured else None
        if index >= len(events) or call is None or wanted is None:
            return False
        if call.func._schema.name != wanted.op or _mark(events[index]) != _mark(wanted):  # noqa: SLF001 - its public name
            return False
    return True


def _mark(event: OpEvent) -> tuple[object, ...]:
    return event.op, event.node, event.frame, event.module


@dataclass(frozen=True, slots=True)
class _Choice:
    """What is to be called: the scene, where its failure shows, and what is to be said of it."""

    scene: Scene
    look: Look | None
    note: str = ""


def _chosen(target: Target, places: Mapping[str, int], captured: Captured) -> _Choice:
    """The forward op and the gradient that came to it, where that shows the failure; else the op.

    An op of a formula, called with what it was given, shows its failure as well, only further from
    the user's line.
    """
    note = ""
    if target.is_of_node:
        call = captured.calls.get(places.get("maker", -1))
        gradients = captured.incoming.get(places.get("maker", -1))
        if call is None or call.unfit or not gradients:
            note = "the gradient that came to the forward op could not be captured"
        else:
            scene = Scene.of(call, gradients)
            look = _look_at_gradients(scene, target.event.node)
            if look is not None:
                return _Choice(scene, look)
            note = "the forward op and the gradient that came to it do not show it by themselves"
        note += f": the op of the formula, {_plain(target.event.op)}, is called instead"
    scene = Scene.of(captured.calls[places["event"]])
    look = _look_at(target.event)
    if not scene.is_dense:
        look = replace(look, at=None)  # what is looked at are the values that are stored
    try:
        results = scene.results()
        if look.position < len(results):
            return _Choice(scene, look, note)
        reason = "it returns fewer tensors"
    except Exception as error:  # noqa: BLE001 - whatever the op raises is the answer
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return _Choice(scene, None, f"{_plain(target.event.op)} cannot be called by itself: {reason}")


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


def _handed_over(target: Target, choice: _Choice, done: Replay, folder: Path) -> Reproduction:
    before = sum(t.numel() * t.element_size() for t in choice.scene.named.values())
    small = Reduced(choice.scene, choice.look or Look(0))
    shows = small.look.mask(choice.scene.results()[small.look.position].tensor)
    if bool(shows.any()):
        small = reduced(choice.scene, small.look)
    notes = [choice.note, small.note]
    about = list(_about(target, small, notes))
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


def _about(target: Target, small: Reduced, notes: list[str]) -> Iterator[str]:
    """What the script says of itself."""
    finding, event = target.finding, target.event
    if small.scene.incoming and target.maker is not None:
        formula = f"{finding.node} → {_plain(event.op)}"
        head = f"{target.maker.op}: its backward ({formula}) returns a gradient that is not finite."
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
