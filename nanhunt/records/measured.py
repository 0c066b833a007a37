"""What one replay measured: facts of tensors, ops as they ran, and the sinks at the end."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["data", "forward", "backward", "optimizer"]
SinkKind = Literal[
    "batch",
    "buffer",
    "parameter",
    "optimizer",
    "captured",
    "output",
    "loss",
    "gradient",
    "stepped",
]


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """What was counted in one tensor; the counts are of elements (complex: of either part)."""

    shape: tuple[int, ...]
    dtype: str
    nan: int = 0
    posinf: int = 0
    neginf: int = 0

    @property
    def nonfinite(self) -> int:
        """Number of elements that are NaN or infinite."""
        return self.nan + self.posinf + self.neginf

    @property
    def is_finite(self) -> bool:
        """Whether no element is NaN or infinite."""
        return self.nonfinite == 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Operand:
    """Numbers read off one operand of a birth, all of it and at the offending elements.

    `role` is the schema's argument name (`self`, `other`), or `saved NAME` for a tensor that the
    autograd node had kept from the forward. `at` holds up to a few values at the offending
    elements and `at_zero`, `at_negative`, `at_one` how many of all offending elements met that
    value (for complex operands: of the magnitude); they are None where the operand cannot be laid
    over the output.
    """

    role: str
    facts: TensorFacts
    smallest: float | None = None
    largest: float | None = None
    zeros: int = 0
    at: tuple[float, ...] = ()
    at_zero: int | None = None
    at_negative: int | None = None
    at_one: int | None = None
    smallest_normal: float | None = None


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The eigenvalues or singular values that one decomposition call returned.

    `tied` of `matrices` have at least one bit-identical neighbouring pair; `largest_tie` is the
    longest run of identical values; `smallest_gap` the smallest positive or zero distance between
    neighbours; `floor` the median over matrices of the smallest value, `above_floor` the median
    number of values that stand clearly above it (the numerical rank), `largest` the median of the
    largest.
    """

    matrices: int
    size: int
    tied: int
    largest_tie: int
    smallest_gap: float
    floor: float
    above_floor: int
    largest: float


@dataclass(frozen=True, slots=True)
class Birth:
    """The moment at which an op given finite numbers returned non-finite ones.

    `count` elements of output number `output` were born, the first of them at `indices`;
    `samples` is the number of distinct leading indices among them. `scalars` are the numbers
    among the op's arguments, by name. `from_asked` says that the op turned infinities which the
    program had asked for into NaN; `by_engine` that the autograd engine itself added two
    gradients here, outside any node's formula.
    """

    output: int
    count: int
    kind: Literal["nan", "inf", "nan and inf"]
    indices: tuple[tuple[int, ...], ...] = ()
    samples: int | None = None
    operands: tuple[Operand, ...] = ()
    scalars: tuple[tuple[str, float], ...] = ()
    spectrum: Spectrum | None = None
    from_asked: bool = False
    by_engine: bool = False


@dataclass(frozen=True, slots=True)
class Ancestor:
    """One op on the way on which a number came to be; an empty `op` where the step was given it.

    `value` is its output at one element and `operands` what it was given there, by role; `scalars`
    are the plain numbers among its arguments and `event` is its index in the trace.
    """

    op: str
    value: float
    dtype: str
    operands: tuple[tuple[str, float], ...] = ()
    scalars: tuple[tuple[str, float], ...] = ()
    event: int | None = None


@dataclass(frozen=True, slots=True)
class Inquiry:
    """What a replay that kept its tensors told about one offending element of a culprit.

    `lineage` leads from each operand, by role, to the op that made its value, the nearest first.
    `result` is what the forward op behind a backward culprit had returned there and `removed_by`
    the op that took it out of the forward again. `is_gone_in_fp64` is whether a replay in FP64 was
    finite, `growth` by how much the largest parameter had grown since the first step (None: not
    asked), `inner` the op inside of a fused kernel and `is_inner_overflow` whether it left the
    range of its dtype.
    """

    lineage: tuple[tuple[str, tuple[Ancestor, ...]], ...] = ()
    result: float | None = None
    removed_by: str | None = None
    is_gone_in_fp64: bool | None = None
    growth: float | None = None
    inner: str | None = None
    is_inner_overflow: bool = False

    def chain(self, *roles: str) -> tuple[Ancestor, ...]:
        """The lineage of the first of these operands that has one."""
        known = dict(self.lineage)
        return next((known[role] for role in roles if role in known), ())


@dataclass(frozen=True, slots=True)
class Frame:
    """One line of the user's code."""

    file: str
    line: int
    function: str


@dataclass(frozen=True, slots=True)
class HalfOp:
    """An op of the loss that returned half precision: its line, and how often it ran there."""

    op: str
    dtype: str
    frame: Frame
    times: int = 1


@dataclass(frozen=True, slots=True)
class OpEvent:
    """One aten op as it ran.

    `node` and `number` are the autograd node that was running (backward) and its sequence number;
    `made` is the number of the node that the op made (forward). `node_run` counts executions of
    nodes, so that the ops of one formula stand together. `inputs` and `outputs` give what was
    counted, of an op that met nothing non-finite only on request; `dtype` is that of the first
    floating output, else of the first. `caller` is the line that applied the custom
    `autograd.Function` in whose forward the op ran; `in_hook` means that it ran in a hook of the
    node of such a Function, and not in its backward; `sources[i]` are the events that left the
    non-finite elements of input i, or, below zero, -1 - k for the k-th tensor of `Trace.state`.
    `asked` means that the non-finite elements of the outputs are infinities that the program asked
    for; `step` is the training step in which it ran. `thread` is the Python thread in which it ran:
    0 the one of the step itself, then those that the step started, one after the other. Every
    thread counts its nodes on its own, so `made` is a number of `thread`, and `number` one of
    `made_in` (None: of thread 0, or not known).
    """

    index: int
    phase: Phase
    op: str
    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]
    node: str | None = None
    number: int | None = None
    made: int | None = None
    node_run: int = 0
    dtype: str = ""
    module: str = ""
    frame: Frame | None = None
    caller: Frame | None = None
    in_hook: bool = False
    sources: tuple[tuple[int, ...], ...] = ()
    birth: Birth | None = None
    asked: bool = False
    step: int = 0
    thread: int = 0
    made_in: int | None = None

    @property
    def is_finite(self) -> bool:
        """Whether every output is finite."""
        return all(facts.is_finite for facts in self.outputs)

    @property
    def parents(self) -> tuple[int, ...]:
        """Everything that left a non-finite element in an input, once each, in order."""
        return tuple(dict.fromkeys(source for group in self.sources for source in group))


@dataclass(frozen=True, slots=True)
class Sink:
    """A tensor at which a non-finite value matters, or one that the step started from.

    `last` are the events that left its non-finite elements there, as in `OpEvent.sources`;
    `order` is that of the stations of the step at which it was read; `is_unwritten` is whether its
    values look like memory that was never written to, and `asked` whether they are infinities that
    the program asked for, as a mask is.
    """

    kind: SinkKind
    name: str
    facts: TensorFacts
    group: str = ""
    last: tuple[int, ...] = ()
    where: tuple[int, ...] = ()
    order: int = 0
    is_unwritten: bool = False
    asked: bool = False

    @property
    def is_finite(self) -> bool:
        """Whether every element is finite."""
        return self.facts.is_finite


@dataclass(frozen=True, slots=True)
class Term:
    """One named term of the loss: its value, and the ops that belong to it and to no other term."""

    name: str
    value: float
    has_graph: bool
    forward_ops: int = 0
    backward_ops: int = 0


@dataclass(frozen=True, slots=True)
class Passage:
    """What went through one module once: an output tensor, or the gradient that arrived at it.

    `largest` is the largest magnitude and `size` the root mean square of an output or the norm of
    a gradient, both over the finite elements.
    """

    module: str
    direction: Literal["forward", "backward"]
    largest: float
    size: float
    nonfinite: int


@dataclass(frozen=True, slots=True)
class Pace:
    """One training step in a row of them: its loss, and how large things were.

    `gradient` is the norm over all gradients and `largest` the largest magnitude among the
    parameters before the step; `skipped` says that the scaler did not take the step, or that the
    program left it out, with no loss then.
    """

    step: int
    loss: float
    gradient: float
    largest: float
    skipped: bool = False


@dataclass(frozen=True, slots=True)
class Trace:
    """Everything that one recorded replay measured.

    `state` are the tensors that the step started from and that were not finite; `batch` all
    tensors of the batch by name, `outputs` what the root module returned, `without_gradient` the
    trainable parameters that got none, `passages` what went through each module. `owners` maps a
    node number to the loss terms from whose value that node can be reached.
    """

    events: tuple[OpEvent, ...]
    sinks: tuple[Sink, ...]
    state: tuple[Sink, ...] = ()
    loss: float = math.nan
    terms: tuple[Term, ...] = ()
    owners: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    batch: tuple[tuple[str, TensorFacts], ...] = ()
    outputs: tuple[Sink, ...] = ()
    without_gradient: tuple[str, ...] = ()
    passages: tuple[Passage, ...] = ()

    @property
    def nonfinite_sinks(self) -> tuple[Sink, ...]:
        """The sinks that hold a NaN or an infinity."""
        return tuple(sink for sink in self.sinks if not sink.is_finite)
