"""What an investigation concluded: findings, runs and ablations in lines, and the whole report."""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from nanhunt.records.measured import Frame, HalfOp, Pace, Phase, Term

Verdict = Literal["healthy", "culprit", "unexplained", "at_risk"]


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
    measured; `explanation` follows from it. `step` is the training step in which it ran; `where`
    names the tensor that was non-finite before the step (`batch[0]`, `param:head.weight`,
    `buffer:norm.running_var`). `path` leads from the culprit to the first poisoned
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
    step: int = 0
    where: str | None = None
    path: tuple[Step, ...] = ()
    poisoned: tuple[tuple[str, int, int], ...] = ()

    @property
    def term(self) -> str | None:
        """The loss term or terms that own the culprit, as one word; None without named terms."""
        return ", ".join(self.terms) or None

    @property
    def is_on_gradients(self) -> bool:
        """Whether an op outside of all nodes computed on gradients: a sum of them, a clipping."""
        return self.phase == "backward" and self.node is None


@dataclass(frozen=True, slots=True)
class Group:
    """The gradients of one set of parameters after a backward.

    `error` is their distance from those of an FP64 replay, relative to the norm there (None: not
    compared).
    """

    name: str
    norm: float
    nonfinite: int
    parameters: int
    without_gradient: int = 0
    error: float | None = None


@dataclass(frozen=True, slots=True)
class ModuleFacts:
    """What one module did in a replay, over all its calls.

    `forward` and `backward` count its ops by dtype. `largest` and `rms` are the largest magnitude
    and the root mean square of the finite elements of its outputs, `gradient` the norm of the
    gradient that arrives at them (None where none was seen); `nonfinite_out` and
    `nonfinite_gradient` count elements.
    """

    module: str
    forward: tuple[tuple[str, int], ...] = ()
    backward: tuple[tuple[str, int], ...] = ()
    largest: float | None = None
    rms: float | None = None
    gradient: float | None = None
    nonfinite_out: int = 0
    nonfinite_gradient: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """One replay in one line: the variant, what was ablated, and what came out.

    `raised` is the error of a variant that could not run. `culprit` is the finding of this very
    run and `culprit_dtype` the dtype in which that op really ran. `stepped` is whether parameters
    were looked at after an optimizer step, `without_gradient` names the trainable parameters that
    got none. `loss_ops` counts the ops of the loss, outside of the model, and `half_ops` are those
    that returned half precision (both None: not watched). `modules` tells what each module did in
    a variant that was recorded; that of the native run is `Report.modules`.
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
    stepped: bool = False
    without_gradient: tuple[str, ...] = ()
    loss_ops: int | None = None
    half_ops: tuple[HalfOp, ...] | None = None
    modules: tuple[ModuleFacts, ...] = ()

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


# Recipes that are to contribute nothing where there is nothing, and those that drop what they meet.
_SKIPPING = ("skip_empty", "zero_empty_rows", "zero_infinity", "correction_zero")
_HIDING = ("saturate", "detach_vectors")
ENDLESS = 1e18  # a loss beyond it, where it was not finite before, is so in name only


@dataclass(frozen=True, slots=True)
class Trial:
    """One replay with one thing changed, to see whether the failure goes away.

    `recipe` is the slug of what was changed and `change` says it in words; `before` and `after` are
    the user's line, where the change can be written there. `sites` are the lines that were changed
    and `times` is how often the changed calls ran. `loss_change` is relative to the loss as given,
    or to that of `reference` where it was not finite; `gradient_error` is the distance of the
    gradients from those of `reference`, relative to their norm; both are None where there is
    nothing finite to compare with. `result_change` is how far the results of the changed calls are
    from what they were, over the elements that were finite, and where no FP64 reference tells,
    `vanished` counts the parameters whose gradient became exactly 0 and `revived` those whose non-
    finite gradient became a number other than 0. `loss_tolerance` and `gradient_tolerance` are what
    a proof allows. `culprit_after` is what made the next non-finite value, and `raised` the error
    of a replay that could not run.
    """

    recipe: str
    change: str
    finite: bool = False
    sites: tuple[str, ...] = ()
    times: int = 0
    before: str | None = None
    after: str | None = None
    loss: float = math.nan
    loss_change: float | None = None
    gradient: float = math.nan
    gradient_error: float | None = None
    reference: str = ""
    result_change: float | None = None
    vanished: int = 0
    revived: int = 0
    loss_tolerance: float = 1e-3
    gradient_tolerance: float = 1e-2
    culprit_after: str | None = None
    raised: str | None = None
    seconds: float = 0.0

    @property
    def is_neutralising(self) -> bool:
        """Whether the value was repaired at birth, which shows a cause and is no fix."""
        return self.recipe == "neutralise"

    @property
    def recipes(self) -> tuple[str, ...]:
        """The recipes that were applied together."""
        return tuple(self.recipe.split(" + "))

    @property
    def is_compared(self) -> bool:
        """Whether there was anything finite to compare the step with."""
        return (self.loss_change, self.gradient_error) != (None, None)

    @property
    def is_silent(self) -> bool:
        """Whether all that failed learns nothing any more, and not because it is to be skipped."""
        skips = any(recipe in _SKIPPING for recipe in self.recipes)
        return self.vanished > 0 and not self.revived and not skips

    @property
    def is_unverified(self) -> bool:
        """Whether it hides what it meets, and no FP64 gradient or loss shows that it may."""
        is_referred = self.gradient_error is not None and self.reference.startswith("fp64")
        is_hiding = any(recipe in _HIDING for recipe in self.recipes) and not is_referred
        return is_hiding or (self.loss_change is None and abs(self.loss) > ENDLESS)

    @property
    def is_proven(self) -> bool:
        """Whether it makes the step finite and leaves what was finite as it was."""
        changed = self.loss_change if self.is_compared else self.result_change
        return (
            self.finite
            and not self.is_neutralising
            and not self.is_silent
            and not self.is_unverified
            and (changed is None or changed <= self.loss_tolerance)
            and (self.gradient_error is None or self.gradient_error <= self.gradient_tolerance)
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """Whether a replay of a part of the batch, or from another seed, was finite."""

    value: int
    finite: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """One question of the differential diagnosis, its answer, and what was measured for it."""

    question: str
    asks: str
    answer: Literal["yes", "no", "cannot tell"]
    evidence: str


@dataclass(frozen=True, slots=True)
class Reproduction:
    """A script that is to show one culprit with torch alone, and what came of running it.

    `folder` is where it was written, empty where there is nothing to call; `works` is whether it
    showed the failure in a process of its own, and `shown` what it printed then. With `is_backward`
    it calls the forward op and feeds the gradient that came to it. `operands` are (name, shape in
    the step, shape in the file), `bytes` the size of the folder and `bytes_before` that of the
    operands in the step.
    """

    folder: str
    works: bool
    shown: str = ""
    is_backward: bool = False
    operands: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    bytes: int = 0
    bytes_before: int = 0
    note: str = ""


RankState: TypeAlias = Literal["culprit", "received", "finite", "unexplained", "missing"]


@dataclass(frozen=True, slots=True)
class Rank:
    """What one of several processes found when it replayed its own part of the step.

    `state` is whether it made the non-finite value, only received it, found its part finite, cannot
    tell, or did not answer in time; `culprit` is the op and its line.
    """

    rank: int
    state: RankState
    culprit: str = ""


Sameness: TypeAlias = Literal["equal to the bit", "differs", "not comparable", "not compared"]


@dataclass(frozen=True, slots=True)
class Provenance:
    """The capsule from which a step was replayed, and whether the step came again.

    `bits` is how loss and gradients of the native replay compare with those of the original step,
    `why` says what keeps them from being compared; `device` is that of the original, `incomplete`
    names what the capsule could not hold, `saved` is the sentence that was stored with it.
    """

    file: str
    step: int
    rank: int = 0
    bits: Sameness = "not compared"
    why: str = ""
    device: str = "cpu"
    incomplete: tuple[str, ...] = ()
    saved: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of one investigation; everything a renderer needs.

    `headline` says what is non-finite; `precision` what the comparison of the precisions shows;
    `twins` are pairs of weights whose names are easily confused; `weights` are those that the live
    objective holds, `configured` those of the configuration; `deterministic` is whether two
    native replays agreed to the bit (None: not compared); `steps` were to be taken, and `pace`
    tells of those that were, the last one being the one that is reported; `trials` are the replays
    with one thing changed; `harmless` are the non-finite values that reached no sink; `repro` is
    the script that was asked for; `ranks` are the processes that took the step together, `rank` the
    one whose replay is told; `capsule` is where the step came from, if from one; `notes` are
    further measured facts; `command` repeats the run.
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
    trials: tuple[Trial, ...] = ()
    precision: str = ""
    diagnosis: tuple[Answer, ...] = ()
    modules: tuple[ModuleFacts, ...] = ()
    twins: tuple[tuple[str, str], ...] = ()
    weights: tuple[tuple[str, float], ...] = ()
    configured: tuple[tuple[str, float], ...] = ()
    seed: int = 0
    deterministic: bool | None = None
    steps: int = 1
    pace: tuple[Pace, ...] = ()
    harmless: tuple[str, ...] = ()
    repro: Reproduction | None = None
    rank: int | None = None
    ranks: tuple[Rank, ...] = ()
    capsule: Provenance | None = None
    notes: tuple[str, ...] = ()
    not_checked: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def native(self) -> Run | None:
        """The baseline replay of the subject exactly as given."""
        return next((r for r in self.runs if r.variant == "native" and not r.ablated), None)
