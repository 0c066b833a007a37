"""The observer of a running program: its sinks, its births, and what may be forgotten of it."""

import contextlib
import functools
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from nanhunt import measurement
from nanhunt.analysis import Suspect, find_suspects
from nanhunt.errors import NonFiniteError
from nanhunt.guarding import wording
from nanhunt.guarding.allowing import Allowed
from nanhunt.guarding.naming import Names, bad_among
from nanhunt.guarding.wires import is_in_engine
from nanhunt.recorder import Recorder, unrecorded
from nanhunt.records import Finding, OpEvent, Report, Sink, SinkKind, Trace
from nanhunt.replay.ends import read_sink
from nanhunt.replay.objective import reachable_nodes
from nanhunt.report.short import tell

# So many events are held, where nothing else is asked for. Once there are twice as many, the older
# ones are let go between two steps: to do so takes a look at all of them.
KEPT = 100_000
_SINK_OF: Mapping[str, SinkKind] = {"backward": "gradient", "optimizer": "stepped"}


@dataclass(frozen=True, slots=True)
class Choice:
    """What the user asked of one block."""

    model: nn.Module | None
    stop: Literal["sink", "birth"]
    on_culprit: Callable[[Report], object] | None
    allowed: Allowed


class Observer:
    """Watches one thread from the outermost block on; the innermost block's choice counts."""

    def __init__(self, recorder: Recorder | None = None, *, kept: int | None = None) -> None:
        self.recorder = recorder or Recorder()
        self._kept = KEPT if kept is None else kept
        self.is_listening = True  # but not while it tells the user
        self._thread = threading.get_ident()
        self._choices: list[Choice] = []
        self._names = Names(self.recorder)
        self._loss: Tensor | None = None
        self._unscaled: list[tuple[weakref.ref[Tensor], Tensor]] = []
        self._scaler: Any = None
        self._leaves: dict[int, Tensor] | None = None  # of the backward that is running
        self._deferred: dict[int, Tensor] = {}  # leaves on which the scaler is to judge
        self._has_stepped = False
        # Backwards of losses that were non-finite and let pass: what they compute follows from it.
        self._idle: list[tuple[int, int]] = []
        self._is_idle = False
        self._marks: list[int] = []
        self._told: set[object] = set()

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Record and watch."""
        self.recorder.on_root = self._enter_root
        with self.recorder.recording():
            handle = register_optimizer_step_post_hook(self._stepped)
            try:
                yield
            finally:
                handle.remove()
                self.recorder.on_root = None

    @contextlib.contextmanager
    def under(self, choice: Choice) -> Iterator[None]:
        """Do as a block asks while it is open."""
        self._choices.append(choice)
        try:
            self._obey()
            if choice.model is not None:
                self._names.learn(choice.model)
            yield
            if len(self._choices) == 1 and self._deferred and self._scaler is not None:
                self._judge(list(self._deferred.values()))  # the scaler does so after the block
        finally:
            self._choices.pop()
            self._obey()

    def _obey(self) -> None:
        births = bool(self._choices) and self._choices[-1].stop == "birth"
        self.recorder.on_birth = self._born if births else None

    def _enter_root(self, module: nn.Module) -> None:
        if all(choice.model is None for choice in self._choices):
            self._names.meet(module)
        if not torch.is_grad_enabled():
            self.forget()  # an evaluation has no backward at which to do it

    # -- backwards -----------------------------------------------------------------------------

    def backward(
        self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run the engine; look at the loss before it and at the gradients of the leaves after it.

        Gradients that are only returned are the program's business until they reach a loss.
        """
        if not kwargs.get("accumulate_grad"):
            return run(*args, **kwargs)
        inputs = args[4] if len(args) > 4 else ()
        leaves = dict(_leaves_of(args[0], inputs))
        if self._leaves is not None:  # one inside another: a checkpoint runs its part again
            self._leaves |= {i: t for i, t in leaves.items() if isinstance(t, nn.Parameter)}
            return run(*args, **kwargs)
        self._look_at_given(args[1] if len(args) > 1 else ())
        is_idle = self._look_at_losses(args[0])
        self._is_idle |= is_idle
        self._leaves = leaves
        first = self._node_run()
        try:
            returned = run(*args, **kwargs)
            leaves = self._leaves | self._names.spread
        finally:
            self._leaves = None
        if is_idle:
            self._idle.append((first, self._node_run()))
        elif self._scaler is not None:
            self._deferred |= leaves
        elif self.look_at_gradients(leaves.values(), None):
            self._is_idle = False
        if self._has_stepped:
            self._next_step()
        self.forget()
        return returned

    def _node_run(self) -> int:
        position = self.recorder.position
        return self.recorder.event(position - 1).node_run if position else 0

    def _look_at_given(self, gradients: Iterable[Any]) -> None:
        """Note the gradients that a backward is handed, where they are non-finite by then."""
        given = [gradient for gradient in gradients if isinstance(gradient, Tensor)]
        if not given:
            return
        with unrecorded(), torch.no_grad():
            for position in bad_among(given):
                gradient = given[position]
                sink = read_sink("gradient", "the gradient given", gradient, self.recorder)
                self.recorder.note_state(sink, gradient)

    def _look_at_losses(self, roots: Iterable[Any]) -> bool:
        """Judge the losses; whether one is non-finite and was let pass."""
        let_pass = False
        for root in roots:
            if not isinstance(root, Tensor) or root.numel() != 1:
                continue  # what is no single number is no loss
            known = next((loss for scaled, loss in self._unscaled if scaled() is root), None)
            loss = self._loss = measurement.local(root.detach() if known is None else known)
            with unrecorded(), torch.no_grad():
                if not bad_among([loss]):
                    continue
                if known is None and not bool(torch.isnan(loss)) and self._has_remedy():
                    continue  # it was computed with after it was scaled: the scale may be too large
                sink = read_sink("loss", "loss", loss, self.recorder)
                value = loss.item()
            number = value if isinstance(value, float) else math.nan
            self._tell(wording.see_loss(sink, number), loss)
            let_pass = True
        return let_pass

    def look_at_gradients(self, leaves: Iterable[Tensor], scale: float | None) -> bool:
        """Judge the gradients; whether all are finite."""
        given = [leaf for leaf in leaves if leaf.grad is not None]
        gradients = [leaf.grad for leaf in given if leaf.grad is not None]
        with unrecorded(), torch.no_grad():
            bad = [given[i] for i in bad_among(gradients)]
            if not bad:
                return True
            sinks = tuple(
                read_sink("gradient", name, leaf.grad, self.recorder, group)
                for group, name, leaf in self._names.of(bad)
                if leaf.grad is not None
            )
            loss = self._loss_value()
        sizes: dict[str, int] = {}
        for group, _, _ in self._names.of(given):
            sizes[group] = sizes.get(group, 0) + 1
        self._tell(wording.see_gradients(sinks, sizes, loss, scale), bad[0])
        return False

    def _loss_value(self) -> float | None:
        if self._loss is None:
            return None
        value = self._loss.item()
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    # -- gradient scalers ----------------------------------------------------------------------

    def scale(
        self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Scale a loss; until the next update the scaler judges the gradients."""
        scaled = run(*args, **kwargs)
        scaler, outputs = args[0], args[1] if len(args) > 1 else kwargs.get("outputs")
        if scaler.is_enabled():
            self._scaler = scaler
            if isinstance(outputs, Tensor) and isinstance(scaled, Tensor):
                self._unscaled = [known for known in self._unscaled if known[0]() is not None]
                self._unscaled.append((weakref.ref(scaled), outputs.detach()))
        return scaled

    def step(
        self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Let the scaler judge; a step that it skips is healthy while a smaller scale is left."""
        returned = run(*args, **kwargs)
        scaler, optimizer = args[0], args[1] if len(args) > 1 else kwargs["optimizer"]
        if scaler.is_enabled() and self._scaler is scaler:
            self._judge(_parameters_of(optimizer))
        return returned

    def update(
        self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Choose the next scale: the scaled losses are done with."""
        returned = run(*args, **kwargs)
        self._scaler = None
        self._unscaled.clear()
        self._deferred.clear()
        return returned

    def _has_remedy(self) -> bool:
        """Whether a live scaler has a smaller scale to go to."""
        return self._scaler is not None and float(self._scaler.get_scale()) > 1.0

    def _judge(self, leaves: Sequence[Tensor]) -> None:
        if not self._has_remedy():
            self.look_at_gradients(leaves, float(self._scaler.get_scale()))

    # -- optimizers ----------------------------------------------------------------------------

    def _stepped(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        if not self.is_listening or threading.get_ident() != self._thread:
            return
        parameters = _parameters_of(optimizer)
        with unrecorded(), torch.no_grad():
            bad = [parameters[i] for i in bad_among(parameters)]
            sinks = tuple(
                read_sink("stepped", name, parameter, self.recorder, group)
                for group, name, parameter in (self._names.of(bad) if bad else ())
            )
            loss = self._loss_value() if bad else None
        if bad:
            self._tell(wording.see_parameters(sinks, len(parameters), loss), bad[0])
        if is_in_engine():  # an optimizer in a hook: the backward goes on
            self._has_stepped = True
        else:
            self._next_step()
            self.forget()

    def _next_step(self) -> None:
        self.recorder.step += 1
        self._has_stepped = self._is_idle = False

    def forget(self) -> None:
        """Let go of events that no later report needs: a backward or a step has come to its end."""
        position = self.recorder.position
        is_full = position >= 2 * self._kept
        old = [m for m in self._marks if position - m >= self._kept] if is_full else []
        before = max(old, default=0)
        self.recorder.let_go(before)
        left = position - self.recorder.position
        self._marks = [m - left for m in self._marks if m > before] if before else self._marks
        self._marks.append(self.recorder.position)

    # -- telling -------------------------------------------------------------------------------

    def _born(self, index: int) -> None:
        """A birth, told at once."""
        event = self.recorder.event(index)
        if not self.is_listening or (event.phase == "backward" and self._is_excused()):
            return
        if event.birth is None or (event.node is None and self._permits_event(event)):
            return
        kind = _SINK_OF.get(event.phase, "loss")
        sink = Sink(kind, "the result", event.outputs[event.birth.output], last=(index,))
        trace = Trace(self.recorder.events(), (sink,), state=self.recorder.state)
        findings = [
            suspect.finding
            for suspect in find_suspects(trace)
            if any(one.index == index for one in suspect.events)
        ]
        if findings and not self._permits(findings[0]):
            if event.phase == "optimizer":
                self.recorder.stage = "forward"  # the hook that says so will not run
            self._deliver(wording.see_birth(event, sink), findings, None)

    def _is_excused(self) -> bool:
        """Whether births in the running backward follow from its loss or are the scaler's."""
        return self._is_idle or self._has_remedy()

    def _tell(self, sight: wording.Sight, tensor: Tensor) -> None:
        """Find out who made a sink non-finite, and say so unless it is let pass."""
        trace = Trace(self.recorder.events(), sight.sinks, state=self.recorder.state)
        suspects = find_suspects(trace)
        left = [
            suspect.finding
            for suspect in suspects
            if not self._permits(suspect.finding) and not self._is_told(suspect)
        ]
        if left or not (suspects or self._is_idle):
            self._deliver(sight, left, tensor)

    def _is_told(self, suspect: Suspect) -> bool:
        """Whether it ran in the backward of a loss that had been let pass already."""
        runs = [event.node_run for event in suspect.events[:1] if event.phase == "backward"]
        return any(first < run <= last for run in runs for first, last in self._idle)

    def _permits(self, finding: Finding) -> bool:
        place = (finding.file, finding.line or 0) if finding.file else None
        allowed = self._choices[-1].allowed
        return allowed.permits(finding.op, finding.module, place, self._names.paths)

    def _permits_event(self, event: OpEvent) -> bool:
        frames = [frame for frame in (event.frame, event.caller) if frame is not None]
        permits = functools.partial(self._choices[-1].allowed.permits, event.op, event.module)
        places = [(frame.file, frame.line) for frame in frames]
        return any(permits(place, self._names.paths) for place in (*places, None))

    def _deliver(
        self, sight: wording.Sight, findings: Sequence[Finding], tensor: Tensor | None
    ) -> None:
        report = wording.make_report(
            sight,
            findings,
            subject=self._names.subject,
            device=tensor.device.type if tensor is not None else "cpu",
            step=self.recorder.step,
        )
        tell_user = self._choices[-1].on_culprit
        if tell_user is None:
            raise NonFiniteError(tell(report), report)
        first = findings[0] if findings else None
        key = (
            (first.phase, first.op, first.file, first.line, first.module, first.step)
            if first
            else (sight.sinks[0].kind, self.recorder.step)
        )
        if key not in self._told:
            self._told.add(key)
            self.is_listening = False
            try:
                tell_user(report)
            finally:
                self.is_listening = True


def _parameters_of(optimizer: Any) -> list[Tensor]:
    """Every tensor that an optimizer steps."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _leaves_of(roots: Iterable[Any], inputs: Iterable[Any]) -> Iterator[tuple[int, Tensor]]:
    """The leaves that a backward gives gradients to, by `id`: the inputs, else all of the graph."""
    given = list(inputs)
    if given:
        yield from ((id(t), t) for t in given if isinstance(t, Tensor) and t.is_leaf)
        return
    starts = (root.grad_fn if isinstance(root, Tensor) else root.node for root in roots)
    for node in reachable_nodes(starts):
        leaf = None if node.next_functions else getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            yield id(leaf), leaf
