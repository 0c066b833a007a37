"""What the hot path writes down of an op, and the record that is made of it when it is wanted."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nanhunt import measurement
from nanhunt.recorder.frames import read_frame
from nanhunt.records import OpEvent, TensorFacts

Entry: TypeAlias = tuple[Any, ...]


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
    (stage, op, (node, number, made_in), made, run, module, place, applier, hooked, given, outputs,
     dtype, step, thread, met) = raw  # fmt: skip
    return OpEvent(
        index=index,
        phase=stage,
        op=op,
        inputs=met.inputs if met else _facts(given or ()),
        outputs=met.outputs if met else _facts(outputs or ()),
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
