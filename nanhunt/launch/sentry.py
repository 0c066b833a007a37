"""The sentry: stands at the optimizers, the backwards and the scalers of a program."""

import contextlib
import functools
import importlib
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nanhunt.guarding.wires import WIRES
from nanhunt.launch import optimizers
from nanhunt.launch.alarm import Alarm
from nanhunt.launch.buffers import Buffers
from nanhunt.launch.caution import Cautiously, around
from nanhunt.launch.company import Company
from nanhunt.launch.desk import Desk, Order
from nanhunt.launch.gradients import (
    are_finite,
    bad_among,
    gradients_of,
    is_capturing,
    losses_among,
    parameters_of,
)
from nanhunt.launch.ledger import Ledger, count
from nanhunt.records import Report

_LOSSES = 16  # of backwards since the last step, that are looked at with its gradients

Call = tuple[Any, ...]


class Sentry:
    """Watches the steps of a program; switches the recorder on when one fails."""

    is_listening = True

    def __init__(self, order: Order, desk: Desk, ledger: Ledger) -> None:
        self._order, self._desk, self._ledger = order, desk, ledger
        self._is_light = order.mode == "light"
        self._is_off = False
        self._alarm = Alarm(self._found, self._give_up)
        self._buffers = Buffers()
        self._company = Company()
        self._stack = contextlib.ExitStack()
        self._known: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        # How many backwards there had been when the gradients of one were looked at last.
        self._seen: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._tainted: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # since a step was withheld
        self._losses: deque[Tensor] = deque(maxlen=_LOSSES)
        self._scaler: Any = None  # that has scaled a loss and not chosen its next scale yet
        self._calls = 0  # of steps, as the hook tells them
        self._is_stepping = self._is_in_closure = False
        self._handled = -1  # the number of backwards at which a step was withheld
        self._thread = threading.get_ident()
        self._quiet = 0

    def attach(self) -> None:
        """Begin: torch is there."""
        with contextlib.ExitStack() as stack:
            stack.callback(register_optimizer_step_pre_hook(self._before_step).remove)
            stack.enter_context(optimizers.led_to(self._made, self._before_zero))
            stack.enter_context(WIRES.led_to(self))
            self._stack = stack.pop_all()
        self._ledger.is_attached = True
        self._ledger.watches_all = not self._is_light
        if not self._is_light:
            # What is compiled later runs eagerly too only if the compiler is there already.
            importlib.import_module("torch._dynamo")
            self._alarm.is_wanted = not self._order.after_step
            self._alarm.follow()

    def leave(self) -> None:
        """End, and take everything away; not to be called from a hook of an optimizer."""
        self._is_off = True
        self._alarm.leave()
        self._stack.close()

    # -- optimizers ----------------------------------------------------------------------------

    def _made(self, optimizer: Optimizer) -> None:
        if self._is_off or torch.compiler.is_compiling():
            return
        with self._cautiously():
            self._known.add(optimizer)
            if self._is_light:
                self._buffers.find(parameters_of(optimizer))

    def _before_step(self, optimizer: Optimizer, args: Call, kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return None
        if self._is_off:  # the others still ask
            self._company.agree(parameters_of(optimizer) if self._is_light else (), is_bad=False)
            return None
        with self._cautiously():
            return self._look(optimizer, args, kwargs)
        return None

    def _look(self, optimizer: Optimizer, args: Call, kwargs: Mapping[str, Any]) -> Any:
        vars(optimizer).pop("_optimizer_step_code", None)  # of a step that raised
        self._calls += 1
        if threading.get_ident() != self._thread:
            self._ledger.note_unwatched("what a scaler or a backward does in other threads")
        if optimizer not in self._known:
            self._made(optimizer)
        if optimizer not in self._seen:
            kind = type(optimizer).__name__
            self._ledger.optimizers[kind] = self._ledger.optimizers.get(kind, 0) + 1
        self._seen[optimizer] = self._ledger.backwards
        found = getattr(optimizer, "found_inf", None)  # a scaler leaves the skipping to a fused one
        if isinstance(found, Tensor) and bool(found.item()):
            self._left_out_by_scaler()
            self._once_over(optimizer, ())
            return None
        self._is_stepping = True
        if self._is_early():
            if not self._is_light and not self._is_early(ahead=1):
                self._alarm.is_wanted = True
                self._once_over(optimizer, ())
            self._ledger.unseen += 1
            return None
        self._ledger.steps += 1
        if is_capturing():
            return None
        if not self._is_light:
            self._tell_others(gradients_of(parameters_of(optimizer)))
            return None
        closure = optimizers.closure_of(args, kwargs)
        if closure is not None:
            watched = functools.partial(self._run_closure, optimizer, closure)
            return optimizers.with_closure(args, kwargs, functools.wraps(closure)(watched))
        self._judge(optimizer)
        return None

    def _tell_others(self, gradients: Sequence[Tensor]) -> None:
        if self._company.is_there:
            self._company.note_gradients(self._ledger.backwards, is_bad=not are_finite(gradients))

    def _run_closure(self, optimizer: Optimizer, closure: Callable[..., Any], *args: Any) -> Any:
        """Call the closure of a step, which makes the gradients that the step uses."""
        self._is_in_closure = True
        try:
            returned = closure(*args)
        finally:
            self._is_in_closure = False
        if not self._is_off:
            with self._cautiously():
                self._judge(optimizer)
        return returned

    def _judge(self, optimizer: Optimizer) -> None:
        """Look at what a step is about to use, and withhold it where that is not finite."""
        parameters = parameters_of(optimizer)
        gradients = gradients_of(parameters)
        losses = list(self._losses)
        self._losses.clear()
        is_fine = are_finite([*gradients, *losses])
        bad = [] if is_fine else bad_among(gradients)
        if not bad:
            self._company.note_gradients(self._ledger.backwards, is_bad=False)
        if self._company.agree(parameters, is_bad=bool(bad)) and not bad:
            self._withhold(optimizer, parameters, "gradients of another rank")
            return
        if is_fine:
            self._buffers.keep()
            self._note_quiet()
            return
        if bad:
            if self._alarm.observer is not None:
                self._alarm.observer.look_at_gradients(parameters, None)
            self._company.note_gradients(self._ledger.backwards, is_bad=True)
            self._withhold(optimizer, parameters, f"{len(bad)} of {len(gradients)} gradients")
            return
        self._ledger.odd_losses += 1
        self._remark("has finite gradients but a loss that is not finite")
        self._want_recorder()
        self._once_over(optimizer, ())

    def _withhold(self, optimizer: Optimizer, parameters: Sequence[Tensor], bad: str) -> None:
        """Take the gradients away for this step, and put the buffers back."""
        self._handled = self._ledger.backwards
        self._ledger.has_company = self._company.is_there
        self._tainted.add(optimizer)
        saved = [(parameter, parameter.grad) for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        restored = self._buffers.restore()
        if self._buffers.left_out:
            self._ledger.note_unwatched("buffers that are too large to be copied")
        if self._ledger.withheld[-1:] != [self._ledger.tried]:  # a closure may be called again
            self._ledger.withheld.append(self._ledger.tried)
        text = f"of {type(optimizer).__name__} was withheld: {bad} are not finite"
        if restored:
            text += f"; {count(restored, 'buffer')} put back as at the last good step"
        poisoned = len(bad_among(parameters))
        if poisoned:
            text += (
                f"; {poisoned} of {count(len(parameters), 'parameter')} were not finite before, so "
                f"an earlier step did that (--mode full names it)"
            )
        self._remark(text)
        self._want_recorder()
        self._once_over(optimizer, saved)

    def _once_over(
        self, optimizer: Optimizer, saved: Iterable[tuple[Tensor, Tensor | None]]
    ) -> None:
        """Go on when the step is over, but before its hooks: none may be added among them."""
        over = functools.partial(self._step_over, weakref.ref(optimizer), tuple(saved))
        vars(optimizer)["_optimizer_step_code"] = over

    def _step_over(
        self,
        reference: "weakref.ref[Optimizer]",
        saved: tuple[tuple[Tensor, Tensor | None], ...],
    ) -> None:
        optimizer = reference()
        if optimizer is not None:
            vars(optimizer).pop("_optimizer_step_code", None)
            optimizer._optimizer_step_code()  # noqa: SLF001 - the one of its class
        for parameter, gradient in saved:
            if parameter.grad is None:
                parameter.grad = gradient  # the program may want to see it
        if not self._is_off:
            with self._cautiously():
                self._alarm.follow(amid_step=True)

    def _before_zero(self, optimizer: Optimizer) -> None:
        """Look at gradients that are dropped and that no step has used: a program may skip itself.

        An optimizer that steps each time is not looked at again.
        """
        if self._is_off or torch.compiler.is_compiling():
            return
        with self._cautiously():
            if self._is_light and not self._is_early():
                self._look_at_dropped(optimizer)
            self._alarm.follow()

    def _look_at_dropped(self, optimizer: Optimizer) -> None:
        backwards = self._ledger.backwards
        # What a failed backward has left, here or with others, is no failure of its own.
        is_known = optimizer in self._tainted or self._handled == backwards
        self._tainted.discard(optimizer)
        if is_known or self._seen.get(optimizer, 0) == backwards or is_capturing():
            return
        if optimizer in self._seen:
            self._seen[optimizer] = backwards
        gradients = gradients_of(parameters_of(optimizer))
        if are_finite(gradients):
            return
        scale = self._scale()
        if scale is not None and scale > 1:
            self._ledger.skipped += 1
            return
        self._losses.clear()
        self._ledger.left_out += 1
        self._is_stepping = True
        bad = f"{len(bad_among(gradients))} of {len(gradients)} gradients"
        self._remark(f"was left out by the program, or ran compiled: {bad} were not finite")
        self._want_recorder()

    # -- what torch's own calls tell -------------------------------------------------------------

    def backward(self, run: Callable[..., Any], args: Call, kwargs: Mapping[str, Any]) -> Any:
        """Run the engine; keep the losses for the look at the next step."""
        if self._is_off:
            return run(*args, **kwargs)
        self._is_stepping = self._is_in_closure
        with self._cautiously():
            if kwargs.get("accumulate_grad"):
                self._ledger.backwards += 1
                losses = losses_among(args[0])
                if self._is_light and self._scaler is None:
                    self._losses.extend(losses)
                if self._alarm.is_on and self._company.is_there and are_finite(losses):
                    self._company.note_loss(self._ledger.backwards)
            if not self._alarm.is_wanted:
                self._alarm.follow()
        returned = self._pass_on("backward", run, args, kwargs)
        if not self._is_off:
            with self._cautiously():
                self._alarm.follow()
        return returned

    def scale(self, run: Callable[..., Any], args: Call, kwargs: Mapping[str, Any]) -> Any:
        """Scale a loss; until the next update the scaler judges the gradients."""
        if args[0].is_enabled():
            self._scaler = args[0]
        return self._pass_on("scale", run, args, kwargs)

    def step(self, run: Callable[..., Any], args: Call, kwargs: Mapping[str, Any]) -> Any:
        """Have a scaler step an optimizer, and see whether it does."""
        before = self._calls
        returned = self._pass_on("step", run, args, kwargs)
        if not self._is_off:
            with self._cautiously():
                if self._calls == before and args[0].is_enabled():
                    optimizer = args[1] if len(args) > 1 else kwargs["optimizer"]
                    self._left_out_by_scaler()
                    if optimizer in self._known:
                        self._seen.setdefault(optimizer, 0)
                        self._seen[optimizer] = self._ledger.backwards
                self._alarm.follow()
        return returned

    def update(self, run: Callable[..., Any], args: Call, kwargs: Mapping[str, Any]) -> Any:
        """Choose the next scale: the scaled losses are done with."""
        self._scaler = None
        return self._pass_on("update", run, args, kwargs)

    def _pass_on(
        self, name: str, run: Callable[..., Any], args: Call, kwargs: Mapping[str, Any]
    ) -> Any:
        """Ask the observer where the recorder is on."""
        observer = self._alarm.observer
        if observer is None:
            return run(*args, **kwargs)
        return around(getattr(observer, name), (run, args, kwargs), self._give_up)

    def _left_out_by_scaler(self) -> None:
        """A scaler skips a step: healthy while there is a smaller scale to go to."""
        self._is_stepping = True
        if self._is_early():
            self._ledger.unseen += 1
            return
        self._ledger.skipped += 1
        self._losses.clear()
        scale = self._scale()
        if self._is_light and scale is not None and scale <= 1:
            self._remark(f"was skipped at loss scale {scale:g}, and a smaller one is no remedy")
            self._want_recorder()

    def _is_early(self, *, ahead: int = 0) -> bool:
        """Whether the next step is one of the first, which are not to be watched."""
        return self._ledger.tried + ahead < self._order.after_step

    def _scale(self) -> float | None:
        return None if self._scaler is None else float(self._scaler.get_scale())

    # -- the recorder and the telling ------------------------------------------------------------

    def _want_recorder(self) -> None:
        self._quiet, self._alarm.is_wanted = 0, True

    def _note_quiet(self) -> None:
        """One more good step; after enough of them the recorder goes."""
        if self._is_light and self._alarm.is_on and self._alarm.is_wanted:
            self._quiet += 1
            if self._quiet >= self._order.quiet:
                self._alarm.is_wanted = False
                self._desk.say(f"not seen again in {self._quiet} steps; the recorder goes off")

    def _found(self, report: Report) -> None:
        """Tell a culprit, and end the program there unless it is to go on."""
        if self._is_off:
            return
        number = self._ledger.tried + (0 if self._is_stepping else 1)
        when = f"at optimizer step {number}"
        if self._ledger.withheld and self._ledger.withheld[0] < number:
            first = self._ledger.withheld[0]
            when += f" (a failure was first met at step {first}, which was withheld)"
        self._quiet, backward = 0, self._ledger.backwards
        report = self._company.merge(report, backward)
        is_new = self._desk.deliver(report, when=when, aloud=self._company.tells)
        self._company.end_telling(backward)
        if is_new:
            self._ledger.culprits += 1
            if not self._order.keep_going:
                self._is_off = True
                self._alarm.silence()
            self._desk.end()

    def _remark(self, text: str) -> None:
        """Say something about a step, and what the recorder does now."""
        rest = "" if self._alarm.is_on else "; the recorder goes on until it comes again"
        self._desk.remark(f"optimizer step {self._ledger.tried} {text}{rest}")

    def _cautiously(self) -> Cautiously:
        return Cautiously(self._give_up)

    def _give_up(self, error: Exception) -> None:
        """Stop watching because of a failure of ours: the program goes on without."""
        if self._is_off:
            return
        self._is_off = True
        self._alarm.silence()
        last = traceback.extract_tb(error.__traceback__)[-1:]
        place = "".join(f" ({Path(frame.filename).name}:{frame.lineno})" for frame in last)
        self._ledger.failure = f"nanhunt failed with {type(error).__name__}: {error}{place}"
        self._desk.say(f"{self._ledger.failure}; the program goes on unwatched")
