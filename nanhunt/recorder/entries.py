"""What the hot path writes down of an op, and the record that is made of it when it is wanted."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nanhunt import measurement
from nanhunt.recorder.frames import read_frame
from nanhunt.records import OpEvent, TensorFacts

# What many ops have in common is one tuple: the facts of the node that was running, how often nodes
# had been entered, the module, the step and the thread.
Entry: TypeAlias = tuple[Any, ...]
_ABOUT, _MADE = 2, 3


def dtype_of(outputs: Sequence[Tensor]) -> torch.dtype | None:
    """The dtype of the first output that has NaN at all, else of the first output."""
    for tensor in outputs:
        dtype = tensor.dtype
        if dtype not in measurement.EXACT:
            return dtype
    return outputs[0].dtype if outputs else None


def _facts(pairs: Iterable[tuple[torch.Size, torch.dtype]]) -> tuple[TensorFacts, ...]:
    return tuple(TensorFacts(tuple(shape), measurement.dtype_name(dtype)) for shape, dtype in pairs)


def event_of(index: int, raw: Entry) -> OpEvent:
    """Make the record of one entry."""
    stage, info, about, made, place, applier, hooked, dtype, shapes, met = raw
    (node, number, made_in), run, module, step, thread = about
    given, outputs = shapes or ((), ())
    return OpEvent(
        index=index,
        phase=stage,
        op=info.name,
        inputs=met.inputs if met else _facts(given),
        outputs=met.outputs if met else _facts(outputs),
        dtype=measurement.dtype_name(dtype) if dtype is not None else "",
        node=node,
        number=number,
        made=made,
        node_run=run,
        module=module,
        frame=read_frame(*place) if place else None,
        caller=read_frame(*applier) if applier else None,
        in_hook=hooked,
        sources=met.sources if met else (),
        birth=met.birth if met else None,
        asked=bool(met and met.asked),
        step=step,
        thread=thread,
        made_in=made_in,
    )


def number_of(entry: Entry) -> int | None:
    """The number of the node under which it ran."""
    number: int | None = entry[_ABOUT][0][1]
    return number


def made_by(entry: Entry) -> int | None:
    """The number of the node that it made."""
    made: int | None = entry[_MADE]
    return made
