"""What is read at the moment a non-finite value is born: the operands, and what the node kept."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from nanhunt import measurement
from nanhunt.recorder.schema import Call
from nanhunt.records import Birth, Operand, Spectrum

# Where the nodes of decompositions keep the values that decide whether their backward is defined.
_SPECTRA = ("_saved_eigenvalues", "_saved_S")


def describe_birth(
    call: Call, node: Any, *, position: int, output: Tensor, born: Tensor, from_asked: bool
) -> Birth:
    """Read the evidence for the elements `born` (a mask) of output number `position`.

    `node` is the running autograd node or None. Operands that the op overwrote are left out.
    """
    saved, spectrum, is_over = _read_saved(node, born)
    is_addition = call.info.name in ("aten::add", "aten::add_")
    return Birth(
        output=position,
        count=int(born.sum()),
        kind=measurement.kind_of(measurement.dense(output)[born]),
        indices=measurement.first_indices(born),
        samples=measurement.leading_count(born),
        operands=(*_read_operands(call, position, born), *saved),
        scalars=call.numbers,
        spectrum=spectrum,
        from_asked=from_asked,
        by_engine=node is not None and is_addition and is_over,
    )


def _read_operands(call: Call, position: int, born: Tensor) -> Iterator[Operand]:
    """Read the tensors among the arguments; of a list, the one that belongs to this output."""
    # Running statistics are written to in training alone.
    is_kept = dict(call.named).get("training") is False
    mutated = set() if is_kept else {name for _, name in call.info.mutated}
    for name, given in call.named:
        if name in mutated:
            continue  # it holds the result by now
        value = given
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            value = value[position] if position < len(value) else value[0]
        if isinstance(value, Tensor):
            yield measurement.read_operand(name, value, born)


@functools.cache
def _saved_names(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_saved_"))


def _read_saved(node: Any, born: Tensor) -> tuple[list[Operand], Spectrum | None, bool]:
    """Read the tensors that the node kept from the forward.

    The third value is whether the node's formula is over: its tensors are released before the
    engine adds its result to what another node returned (True, too, when it had kept none).
    """
    operands: list[Operand] = []
    spectrum, is_over = None, True
    kind: type = type(node)
    for name in _saved_names(kind) if node is not None else ():
        # Released, refused by a user's unpack hook, or a transform's tensor without memory: what
        # cannot be read is no evidence, and no reason to end the hunt.
        with contextlib.suppress(Exception):
            value = getattr(node, name)
            if isinstance(value, Tensor):
                is_over = False
                if name in _SPECTRA:
                    spectrum = measurement.read_spectrum(value)
                role = f"saved {name.removeprefix('_saved_')}"
                operands.append(measurement.read_operand(role, value, born))
    return operands, spectrum, is_over
