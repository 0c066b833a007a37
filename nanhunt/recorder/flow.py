"""Where non-finite values are, who left them there, and which op made new ones.

Data flow is followed only from the moment a non-finite value exists. The storages that hold one
are known here; every other input is finite without being looked at.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from nanhunt import measurement
from nanhunt.recorder.evidence import describe_birth
from nanhunt.recorder.given import Given, Met, Part, Poison, shape_facts
from nanhunt.recorder.regions import region_of
from nanhunt.recorder.schema import Call, OpInfo
from nanhunt.recorder.screen import AT_ONCE, Look
from nanhunt.records import Birth, Sink, TensorFacts

# Evidence is read for so many births of one step; of the rest only the count is kept.
_MAX_DESCRIBED = 256
# What stands for a repaired value in a forward: inside the domain of logarithms, roots, divisions
# and inverse trigonometric functions, and away from where their slopes are infinite.
_HARMLESS = 0.5


def storage_key(tensor: Tensor) -> int:
    """Identity of the memory that a tensor looks at; 0 where it has none of its own."""
    tensor = measurement.local(tensor)
    try:
        if tensor.layout is not torch.strided:
            tensor = measurement.dense(tensor)
        key: int = tensor.untyped_storage()._cdata  # noqa: SLF001 - not public
    except (RuntimeError, NotImplementedError):
        return 0
    return key


def _memory_of(tensor: Tensor) -> object:
    if not storage_key(tensor):
        return None
    return StorageWeakRef(measurement.dense(tensor).untyped_storage())


def _is_gone(poison: Poison) -> bool:
    """Whether the memory was given back."""
    return isinstance(poison.memory, StorageWeakRef) and bool(poison.memory.expired())


class Flow:
    """Follows the non-finite values of one step from op to op."""

    def __init__(self, look: Look = AT_ONCE) -> None:
        self._look = look
        self.state: list[Sink] = []
        # By storage, what is known of each that holds a non-finite value. It stays one object: the
        # recorder asks it at every op whether there is anything to follow.
        self.poison: dict[int, Poison] = {}
        self._received: dict[int, Poison] = {}
        self._described = 0
        self._missed = 0  # ops that read none of what is known, since it was asked what still lives

    def note_state(self, sink: Sink, tensor: Tensor, *, asked: bool | None = None) -> None:
        """Tell that a tensor was non-finite before any recorded op wrote to it.

        One that a recorded op left so, in a step before, is known already, unless the sink itself
        says who did: it is handed to a backward.
        """
        known = self.poison.get(storage_key(tensor))
        if known is not None and not _is_gone(known) and not sink.last:
            return
        if asked is None:
            is_gradient = sink.kind == "gradient"  # which is no mask
            asked = not is_gradient and _looks_like_a_mask(tensor, sink.facts)
        part = Part(-1 - len(self.state), asked, region_of(tensor))
        self.poison[storage_key(tensor)] = Poison((part,), {}, _memory_of(tensor))
        self.state.append(replace(sink, asked=asked))

    def is_settled(self) -> bool:
        """Whether no memory in use holds a non-finite value that a recorded op left there.

        Asked between two steps: what happened meanwhile was not seen, so all is counted anew.
        """
        self._drop_gone()
        for poison in self.poison.values():
            poison.counted.clear()
        return all(source < 0 for p in self.poison.values() for source in p.sources)

    def _drop_gone(self) -> None:
        """Forget memory that was given back: each op is asked about all that is known."""
        self._missed = 0
        for key in [key for key, poison in self.poison.items() if _is_gone(poison)]:
            del self.poison[key]

    def sources_of(self, tensor: Tensor) -> tuple[int, ...]:
        """Who left the non-finite elements of a tensor, as in `OpEvent.sources`."""
        poison = self.poison.get(storage_key(tensor))
        return poison.seen_by(tensor).sources if poison else ()

    def measure_inputs(self, inputs: list[Tensor], info: OpInfo) -> Given | None:
        """Count inputs that may hold a non-finite value, before an in-place op changes them."""
        is_unknown = info.is_update and storage_key(inputs[0]) not in self.poison
        if is_unknown and not self._look.is_clear_at_first((inputs[0],)):
            self._note_stranger(inputs[0])  # what it holds now cannot be told afterwards
        if info.is_view:
            return None
        poisons = [self.poison.get(storage_key(tensor)) for tensor in inputs]
        if not any(poisons):
            self._missed += 1
            if self._missed > len(self.poison):  # so often that to ask each of them costs little
                self._drop_gone()
            return None
        given = Given(inputs, [None] * len(inputs), poisons, {})
        unread = {position % len(inputs) for position in info.unread}
        for position, (tensor, poison) in enumerate(zip(inputs, poisons, strict=True)):
            is_read = position not in unread and measurement.can_be_nonfinite(tensor)
            if poison is None or not is_read:
                continue
            poisons[position] = poison.seen_by(tensor)
            facts = given.facts[position] = _count_once(tensor, poison)
            if info.is_pointwise and info.mutated and not facts.is_finite:
                given.masks[position] = measurement.nonfinite_mask(tensor)
        return given if given.poisoned else None

    def follow(
        self, call: Call, node: Any, given: Given | None, outputs: list[Tensor], index: int
    ) -> Met | None:
        """Look at what op number `index` returned; None when nothing non-finite was met."""
        info = call.info
        if info.is_view:
            return None
        found: dict[int, TensorFacts] = {}
        if given is not None or (info.is_screened and not self._is_cleared(call, outputs)):
            counted = {i: measurement.count(outputs[i]) for i in measurement.suspects(outputs)}
            found = {i: facts for i, facts in counted.items() if not facts.is_finite}
        if not found:
            self._forget(info, outputs)
            if given is None:
                return None
            return Met(given.all_facts(), _shapes(outputs), given.all_sources())
        if given is None:
            given = self._measure_strangers(call.inputs, outputs)
        position = next(iter(found))
        born = _born(call, given, outputs[position], found[position])
        birth = self._describe(call, node, given, (position, outputs[position], born))
        asked = born is None and given.is_asked
        for i in found:
            self._mark(info, outputs[i], found[i], (index, asked))
        facts = tuple(found.get(i) or shape_facts(t) for i, t in enumerate(outputs))
        return Met(given.all_facts(), facts, given.all_sources(), birth, asked)

    def _is_cleared(self, call: Call, outputs: list[Tensor]) -> bool:
        is_plain = len(outputs) == 1 and type(outputs[0]) is Tensor
        returned = outputs[0] if is_plain else outputs
        found = None if is_plain else outputs
        return self._look.is_cleared(call.info.shortcut, call.args, returned, found)

    def _forget(self, info: OpInfo, outputs: Iterable[Tensor]) -> None:
        """Drop what was known of memory that holds finite values, or another tensor, by now."""
        for tensor in outputs if self.poison else ():
            key = storage_key(tensor)
            if key not in self.poison:
                continue
            if info.is_fresh or _is_storage_finite(tensor):
                del self.poison[key]
            else:
                left = self.poison[key].without(tensor)
                left.counted.clear()
                self.poison[key] = left if left.parts else self.poison[key]

    def _mark(self, info: OpInfo, tensor: Tensor, facts: TensorFacts, by: tuple[int, bool]) -> None:
        """Note that op number `by[0]` left non-finite elements here, asked for or not."""
        index, asked = by
        key = storage_key(tensor)
        old = self.poison.get(key)
        counted = {_view_key(tensor): facts}
        part = Part(index, asked, region_of(tensor))
        if old is None or info.is_fresh or _covers_storage(tensor):
            self.poison[key] = Poison((part,), counted, _memory_of(tensor))
        else:
            # What was there before is an input of the op, so its way back is not lost.
            parts = (*old.without(tensor).parts, part)
            self.poison[key] = Poison(parts, counted, old.memory)

    def _measure_strangers(self, inputs: list[Tensor], outputs: list[Tensor]) -> Given:
        """Count inputs that no recorded op wrote: the value may come from outside the step."""
        written = {storage_key(tensor) for tensor in outputs}
        # A backend may fill the target of a collective from memory that nobody else sees.
        target = next((self._received[key] for key in written if key in self._received), None)
        given = Given(inputs, [None] * len(inputs), [None] * len(inputs), {})
        for position, tensor in enumerate(inputs):
            key = storage_key(tensor)
            facts = given.facts[position] = None if key in written else measurement.count(tensor)
            if facts is None or facts.is_finite or _is_written_nan(tensor, facts):
                given.facts[position] = None
                continue
            self._note_stranger(tensor, target)
            given.poisons[position] = self.poison[key]
        return given

    def note_collective(self, tensors: Iterable[Tensor], index: int) -> None:
        """Tell that other ranks write to these tensors from event `index` on, when they will."""
        for tensor in tensors:
            part = Part(index, asked=False, region=region_of(tensor))
            self._received[storage_key(tensor)] = Poison((part,), {}, _memory_of(tensor))

    def _note_stranger(self, tensor: Tensor, target: Poison | None = None) -> None:
        """Note a tensor that no recorded op wrote, if it is not finite.

        One that is copied to the target of a collective came with that.
        """
        facts = measurement.count(tensor)
        received = self._received.get(storage_key(tensor), target)
        if received is not None and not _is_gone(received) and not facts.is_finite:
            self.poison[storage_key(tensor)] = received._replace(memory=_memory_of(tensor))
        elif not facts.is_finite:
            name = f"a tensor {list(tensor.shape)} made outside the step"
            where = measurement.first_indices(measurement.nonfinite_mask(tensor))
            sink = Sink("captured", name, facts, where=where[0] if where else ())
            # An infinity that the program holds as a constant was asked for; a NaN was not.
            self.note_state(sink, tensor, asked=not facts.nan)

    def _describe(
        self, call: Call, node: Any, given: Given, born: tuple[int, Tensor, Tensor | None]
    ) -> Birth | None:
        position, output, mask = born
        if mask is None:
            return None
        self._described += 1
        if self._described > _MAX_DESCRIBED:
            kind = measurement.kind_of(measurement.dense(output)[mask])
            return Birth(position, int(mask.sum()), kind)
        return describe_birth(
            call,
            node,
            position=position,
            output=output,
            born=mask,
            from_asked=given.is_asked and bool(given.poisoned or _infinities(call)),
        )


def _infinities(call: Call) -> list[float]:
    return [value for value in _literals(call) if not math.isnan(value)]


def _is_written_nan(tensor: Tensor, facts: TensorFacts) -> bool:
    """Whether a tensor looks like the plain number NaN, as it is handed to arithmetic."""
    return bool(facts.nan) and not tensor.dim() and tensor.is_cpu and tensor.dtype is torch.float64


def _literals(call: Call) -> list[float]:
    """The infinities and NaNs that are written down as plain numbers."""
    return [value for _, value in call.numbers if value - value != 0.0]


def _born(call: Call, given: Given, output: Tensor, facts: TensorFacts) -> Tensor | None:
    """Mask of the elements of `output` that this very op made non-finite; None if it made none.

    An op makes a non-finite value where all it was given is finite, or where it turns infinities
    that were asked for into NaN. Where it was handed a NaN, or an infinity that arithmetic made,
    only a pointwise op can be told to have made another one beside it.
    """
    values = measurement.dense(output)
    literals = _literals(call)
    # Nobody asks for a NaN: who writes one down makes it.
    if not given.poisoned and (not literals or any(map(math.isnan, literals))):
        return measurement.nonfinite_mask(output)
    has_nan = given.has_nan or any(math.isnan(value) for value in literals)
    if given.is_asked and not has_nan and facts.nan:
        return torch.isnan(values)
    if not call.info.is_pointwise or literals or _is_drowned(given, facts):
        return None
    new = measurement.newborn_mask(output, given.nonfinite_masks())
    return new if new is not None and bool(new.any()) else None


def _is_drowned(given: Given, output: TensorFacts) -> bool:
    """Whether an input was non-finite throughout, so that nothing new can show in the output."""
    return any(
        facts.nonfinite == facts.numel and facts.numel >= output.numel
        for _, facts in given.poisoned
    )


def repair(outputs: Iterable[Tensor], given: Given | None, *, is_backward: bool) -> None:
    """Replace what an op made non-finite by numbers that nearly every op takes.

    Elements that a pointwise op only passed on stay as they are.
    """
    fill = 0.0 if is_backward else _HARMLESS
    for tensor in outputs:
        if not measurement.can_be_nonfinite(tensor):
            continue
        values = measurement.dense(tensor)
        mask = measurement.nonfinite_mask(values)
        if given is not None and given.poisoned and not given.is_asked:
            new = measurement.newborn_mask(values, given.nonfinite_masks())
            mask = mask if new is None else new
        if bool(mask.any()):
            values.masked_fill_(mask, fill)


def _view_key(tensor: Tensor) -> tuple[object, ...]:
    if tensor.layout is not torch.strided:
        return (id(tensor),)
    is_conj = tensor.is_conj()
    return (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, is_conj)


def _count_once(tensor: Tensor, poison: Poison) -> TensorFacts:
    key = _view_key(tensor)
    if key not in poison.counted:
        poison.counted[key] = measurement.count(tensor)
    return poison.counted[key]


def _shapes(tensors: Iterable[Tensor]) -> tuple[TensorFacts, ...]:
    return tuple(shape_facts(tensor) for tensor in tensors)


def _covers_storage(tensor: Tensor) -> bool:
    """Whether a tensor looks at every byte of its storage."""
    values = measurement.dense(tensor)
    return values.numel() * values.element_size() >= values.untyped_storage().nbytes()


def _is_storage_finite(tensor: Tensor) -> bool:
    """Whether all of the memory is finite of which a finite tensor may look at a part."""
    values = measurement.dense(tensor)
    if _covers_storage(values) or not measurement.can_be_nonfinite(values):
        return _covers_storage(values)
    storage = values.untyped_storage()
    size = storage.nbytes() // values.element_size()
    whole = values.new_empty(0).set_(storage, 0, (size,), (1,))
    return not measurement.is_suspect(whole)


def _looks_like_a_mask(tensor: Tensor, facts: TensorFacts) -> bool:
    """Whether infinities stand in a tensor as they do in a mask: -inf, and 0 elsewhere."""
    if facts.nan or facts.posinf or not facts.neginf:
        return False
    values = measurement.dense(tensor)
    return not bool((values[torch.isfinite(values)] != 0).any())
