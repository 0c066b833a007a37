"""What was measured and what follows from it: frozen records, standard library only.

The spine of the package. The rooms that know torch write these records; the rooms that tell about
them read them and never need torch. Nothing here holds a live tensor, and nothing renders itself.

Two families live here:

- what one replay measured: `TensorFacts`, `Operand`, `Spectrum`, `Birth`, `Frame`, `OpEvent`,
  `Sink`, `Trace`;
- what an investigation concluded: `Finding`, `Run`, `Ablation`, `Report`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["data", "forward", "backward", "optimizer"]
Verdict = Literal["healthy", "culprit", "unexplained", "at_risk"]
SinkKind = Literal[
    "batch", "buffer", "parameter", "optimizer", "captured", "loss", "gradient", "stepped"
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
class Frame:
    """One line of the user's code."""

    file: str
    line: int
    function: str


@dataclass(frozen=True, slots=True)
class OpEvent:
    """One aten op as it ran.

    `node` and `number` are the autograd node that was running (backward) and its sequence number;
    `made` is the number of the node that the op made (forward). `node_run` counts executions of
    nodes, so that the ops of one formula stand together. `inputs` and `outputs` give what was
    counted; `caller` is the line that applied the custom `autograd.Function` in whose forward the
    op ran; `sources[i]` are the events that left the non-finite elements of input i, or, below
    zero, -1 - k for the k-th tensor of `Trace.state`. `asked` means that the non-finite
    elements of the outputs are infinities that the program asked for.
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
    module: str = ""
    frame: Frame | None = None
    caller: Frame | None = None
    sources: tuple[tuple[int, ...], ...] = ()
    birth: Birth | None = None
    asked: bool = False

    @property
    def is_finite(self) -> bool:
        """Whether every output is finite."""
        return all(facts.is_finite for facts in self.outputs)

    @property
    def parents(self) -> tuple[int, ...]:
        """Everything that left a non-finite element in an input, once each, in order."""
        return tuple(dict.fromkeys(source for group in self.sources for source in group))

    @property
    def dtype(self) -> str:
        """The dtype of the first floating output, else of the first output."""
        floating = (f.dtype for f in self.outputs if f.dtype.startswith(("float", "bf", "compl")))
        return next(floating, self.outputs[0].dtype if self.outputs else "")


@dataclass(frozen=True, slots=True)
class Sink:
    """A tensor at which a non-finite value matters, or one that the step started from.

    `last` are the events that left its non-finite elements there, as in `OpEvent.sources`.
    """

    kind: SinkKind
    name: str
    facts: TensorFacts
    group: str = ""
    last: tuple[int, ...] = ()
    where: tuple[int, ...] = ()

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
class Trace:
    """Everything that one recorded replay measured.

    `state` are the tensors that the step started from and that were not finite. `owners` maps a
    node number to the loss terms from whose value that node can be reached.
    """

    events: tuple[OpEvent, ...]
    sinks: tuple[Sink, ...]
    state: tuple[Sink, ...] = ()
    loss: float = math.nan
    terms: tuple[Term, ...] = ()
    owners: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    @property
    def nonfinite_sinks(self) -> tuple[Sink, ...]:
        """The sinks that hold a NaN or an infinity."""
        return tuple(sink for sink in self.sinks if not sink.is_finite)


@dataclass(frozen=True, slots=True)
class Step:
    """One station of the way from the culprit to the first poisoned parameters."""

    op: str
    node: str | None
    module: str
    frame: Frame | None


@dataclass(frozen=True, slots=True)
class Finding:
    """One culprit: the op that first made the non-finite value which reached a sink.

    For a backward fault `op` is the forward op whose backward formula is at fault, `node` its
    autograd node and `formula_op` the first aten op inside that formula which returned a
    non-finite value; `file`, `line` and `module` are those of the forward call. `evidence` was
    measured; `explanation` follows from it. `path` leads from the culprit to the first poisoned
    parameters, of which `poisoned` counts (group, non-finite, all) per group.
    """

    phase: Phase
    op: str
    node: str | None = None
    formula_op: str | None = None
    file: str | None = None
    line: int | None = None
    function: str | None = None
    source: str | None = None
    module: str = ""
    terms: tuple[str, ...] = ()
    cause: str | None = None
    dtype: str = ""
    occurrence: int = 1
    evidence: tuple[str, ...] = ()
    explanation: str = ""
    recipes: tuple[str, ...] = ()
    path: tuple[Step, ...] = ()
    poisoned: tuple[tuple[str, int, int], ...] = ()

    @property
    def term(self) -> str | None:
        """The loss term or terms that own the culprit, as one word; None without named terms."""
        return ", ".join(self.terms) or None


@dataclass(frozen=True, slots=True)
class Group:
    """The gradients of one set of parameters after a backward."""

    name: str
    norm: float
    nonfinite: int
    parameters: int
    without_gradient: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """One replay in one line: the variant, what was ablated, and what came out.

    `raised` is the error of a variant that could not run. `culprit` is the finding of this very
    run and `culprit_dtype` the dtype in which that op really ran.
    """

    variant: str
    ablated: tuple[str, ...] = ()
    raised: str | None = None
    loss: float = math.nan
    terms: tuple[Term, ...] = ()
    groups: tuple[Group, ...] = ()
    stepped_nonfinite: int = 0
    culprit: str | None = None
    culprit_dtype: str | None = None
    culprit_line: str | None = None
    scale: float | None = None
    notes: tuple[str, ...] = ()
    ops: int = 0
    seconds: float = 0.0

    @property
    def nonfinite(self) -> int:
        """Number of parameters with a non-finite gradient."""
        return sum(group.nonfinite for group in self.groups)

    @property
    def parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(group.parameters for group in self.groups)

    @property
    def is_finite(self) -> bool:
        """Whether it ran and loss, gradients and stepped parameters are finite."""
        return (
            self.raised is None
            and math.isfinite(self.loss)
            and self.nonfinite == 0
            and self.stepped_nonfinite == 0
        )


@dataclass(frozen=True, slots=True)
class Ablation:
    """One ablation as it was replayed natively.

    `names` are the weights or terms taken out (or, for `mode` "alone", the one left in).
    `weight_before` and `weight_after` are what the live objective held; `ops_before` and
    `ops_after` count the ops that belong to these terms alone, forward and backward together.
    `took_effect` is None where nothing could show it.
    """

    names: tuple[str, ...]
    mode: Literal["without", "alone"]
    requested: bool
    finite: bool
    took_effect: bool | None = None
    weight_before: float | None = None
    weight_after: float | None = None
    ops_before: tuple[int, int] | None = None
    ops_after: tuple[int, int] | None = None
    loss: float = math.nan
    groups: tuple[Group, ...] = ()
    raised: str | None = None

    @property
    def cures(self) -> bool:
        """Whether the step is finite without these names."""
        return self.finite and self.mode == "without"


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of one investigation; everything a renderer needs.

    `headline` says what is non-finite; `precision` what the comparison of the precisions shows;
    `twins` are pairs of weights whose names are easily confused; `deterministic` is whether two
    native replays agreed to the bit (None: not compared); `notes` are further measured facts;
    `command` repeats the run.
    """

    subject: str
    batch: int
    verdict: Verdict
    samples: int | None = None
    versions: tuple[tuple[str, str], ...] = ()
    device: str = "cpu"
    threads: int = 1
    command: str = ""
    headline: str = ""
    culprits: tuple[Finding, ...] = ()
    runs: tuple[Run, ...] = ()
    ablations: tuple[Ablation, ...] = ()
    precision: str = ""
    twins: tuple[tuple[str, str], ...] = ()
    weights: tuple[tuple[str, float], ...] = ()
    deterministic: bool | None = None
    notes: tuple[str, ...] = ()
    not_checked: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def native(self) -> Run | None:
        """The baseline replay of the subject exactly as given."""
        return next((r for r in self.runs if r.variant == "native" and not r.ablated), None)
