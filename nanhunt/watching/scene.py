"""The scene of a failure: the step as a subject that can be replayed, from the state before it."""

import contextlib
import dis
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nanhunt.errors import SubjectError
from nanhunt.generators import Generators
from nanhunt.structure import named_tensors
from nanhunt.subject import Subject
from nanhunt.watching.call import Call, shared_out
from nanhunt.watching.choices import Choices
from nanhunt.watching.previous import Previous

_WRITES = ("STORE_DEREF", "STORE_GLOBAL")


class _Met(TorchFunctionMode):
    """Notes whether some tensors are given to any function of torch."""

    def __init__(self, tensors: set[int]) -> None:
        super().__init__()
        self.tensors = tensors
        self.has_met = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Look at what is given, and call on."""
        given = (*args, *(kwargs or {}).values())
        flat = (x for a in given for x in (a if isinstance(a, (list, tuple)) else (a,)))
        self.has_met = self.has_met or any(id(x) in self.tensors for x in flat)
        return func(*args, **(kwargs or {}))


@dataclass(slots=True)
class Scene:
    """The failing step: what was called, from where the generators stood, as which part of it.

    A replay hands over a copy of the batch. A closure without parameters sees its own batch, so
    the copy's memory is lent to the tensors of that one, until `as_it_was` is left. With `asks`,
    a replay, which must not be recorded then, notes whether the closure uses them at all.
    """

    choices: Choices
    call: Call
    generators: Generators | None
    step: int
    parts: int = 1
    asks: bool = False
    has_met_batch: bool = False
    _lent: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @contextlib.contextmanager
    def as_it_was(self) -> Iterator[None]:
        """Give the closure its surroundings of then; put back what was lent."""
        with self.call.surrounded():
            try:
                yield
            finally:
                self.put_back()

    def put_back(self) -> None:
        """Give the tensors of the batch their own memory again."""
        for tensor, home in reversed(self._lent):
            tensor.data = home
        self._lent.clear()

    @property
    def name(self) -> str:
        """What reports call the subject."""
        return self.choices.subject or type(self.choices.model).__name__

    def subject(self, *, whole: bool = True) -> Subject:
        """The step as a subject; not `whole` hides a batch that the closure does not use."""
        batch = self.call.batch if whole or self.call.takes_batch else None
        return Subject(
            self.choices.model,
            lambda _index: batch,
            self._loss_fn,
            name=self.name,
            scaler=self.choices.live_scaler,
            groups=self.choices.groups,
            step=self.step,
            generators=self.generators,
        )

    def _loss_fn(self, _model: Any, *copied: Any) -> Any:
        if self.call.takes_batch:
            is_tuple = isinstance(self.call.batch, tuple) and not hasattr(
                self.call.batch, "_fields"
            )
            return shared_out(self._called(copied if is_tuple else copied[0]), self.parts)
        originals = [tensor for _, tensor in named_tensors(self.call.batch)]
        if copied != (None,):
            value = copied if isinstance(self.call.batch, tuple) else copied[0]
            self._lend(originals, [tensor for _, tensor in named_tensors(value)])
        if not self.asks:
            return shared_out(self._called(), self.parts)
        with _Met({id(tensor) for tensor in originals}) as met:
            value = self._called()
        self.has_met_batch = met.has_met
        return shared_out(value, self.parts)

    def _called(self, *batch: Any) -> Any:
        try:
            return self.call.closure(*batch)
        except StopIteration as error:  # which a generator further out would take for its own end
            raise SubjectError("an iterator that the closure draws from has ended") from error

    def _lend(self, originals: list[Tensor], copies: list[Tensor]) -> None:
        if len(originals) != len(copies):
            return
        known = {id(tensor) for tensor, _ in self._lent}
        with torch.no_grad():
            for original, copy in zip(originals, copies, strict=True):
                if id(original) not in known:
                    self._lent.append((original, original.data))
                original.data = copy.data

    def doubts(self) -> list[str]:
        """What the closure does besides computing a loss, as far as its code shows it."""
        function = getattr(self.call.closure, "__func__", self.call.closure)
        if not isinstance(function, FunctionType):
            return []
        variables = self.call.variables()
        # A module is no iterator, but what it hands out may be: only what has a next item counts.
        drawn = [n for n, v in variables.items() if hasattr(v, "__next__")]
        written = [i.argval for i in dis.get_instructions(function) if i.opname in _WRITES]
        return [
            *(
                f"the closure holds the iterator {name!r}: each call draws further items"
                for name in drawn
            ),
            *(f"the closure writes the variable {name!r}" for name in dict.fromkeys(written)),
        ]


@dataclass(frozen=True, slots=True)
class PastStep:
    """The optimizer step that was taken last, from the state and the gradients before it."""

    choices: Choices
    previous: Previous

    def subject(self) -> Subject:
        """The step as a subject: its gradients are set as they were, nothing is computed anew."""
        first = self.choices.optimizers[0]
        return Subject(
            self.choices.model,
            [()],
            _no_loss,
            name=self.choices.subject or type(self.choices.model).__name__,
            optimizer=first,
            train_step=self._take,
            groups=self.choices.groups,
            step=self.previous.step or 0,
        )

    def _take(
        self, model: Any, _batch: Any, _loss_fn: Any, _optimizer: Any, _scaler: Any, _step: int
    ) -> Iterator[tuple[str, Tensor]]:
        given = self.previous.gradients()
        # The stations want a loss with a graph; this one is 0 and is never differentiated.
        loss = sum(p.reshape(-1)[:0].sum() for p in model.parameters() if p.requires_grad)
        yield "loss", torch.as_tensor(loss)
        for optimizer in self.choices.optimizers:
            optimizer.zero_grad()
        for parameter, gradient in given:
            parameter.grad = gradient.clone()
        yield "grads", torch.as_tensor(loss)
        for optimizer in self.choices.optimizers:
            optimizer.step()
        yield "step", torch.as_tensor(loss)


def _no_loss(_model: Any) -> None:
    """Stands where a loss would: the step takes its gradients from what was kept."""
