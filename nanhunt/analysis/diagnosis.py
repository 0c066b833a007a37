"""The differential diagnosis: the questions that people ask of a NaN, each with its evidence.

A row of the table is a question and a function that answers it from what was measured, with "yes",
"no" or "cannot tell". The questions are put so that neither answer is always the bad one.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from nanhunt.analysis.comparison import is_given
from nanhunt.analysis.walk import walk_back
from nanhunt.records import Ablation, Answer, Birth, OpEvent, Run, Sample, Sink, Trace

Reply = tuple[Literal["yes", "no", "cannot tell"], str]


@dataclass(frozen=True, slots=True)
class Case:
    """Everything that the questions may look at.

    `configured` are the weights as the configuration has them, `weights` as the live objective
    has; `sizes` and `seeds` are replays of parts of the batch and of other initialisations.
    """

    run: Run
    trace: Trace
    runs: tuple[Run, ...] = ()
    ablations: tuple[Ablation, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    configured: Mapping[str, float] = field(default_factory=dict)
    twins: tuple[tuple[str, str], ...] = ()
    deterministic: bool | None = None
    sizes: tuple[Sample, ...] = ()
    seeds: tuple[Sample, ...] = ()

    def variant(self, name: str) -> Run | None:
        """The replay of a variant without ablations."""
        return next((r for r in self.runs if r.variant == name and not r.ablated), None)

    @property
    def birth(self) -> Birth | None:
        """What was read at the culprit."""
        walk = walk_back(self.trace)
        events = [stop.event for stop in walk.stops if stop.event] if walk else []
        return events[0].birth if events else None


def diagnose(case: Case) -> tuple[Answer, ...]:
    """Answer every question of the table, in its order."""
    answers = ((slug, text, ask(case)) for slug, text, ask in QUESTIONS)
    return tuple(Answer(slug, text, reply, evidence) for slug, text, (reply, evidence) in answers)


# -- before the step, and at its ends --------------------------------------------------------------


def _inputs_finite(case: Case) -> Reply:
    bad = [sink for sink in case.trace.state if sink.kind == "batch"]
    if bad:
        return "no", _told(bad)
    count = len(case.trace.batch)
    return ("yes", f"{_plural(count, 'tensor')} of the batch") if count else _unknown("no tensors")


def _state_finite(case: Case) -> Reply:
    kinds = ("parameter", "buffer", "optimizer")
    bad = [sink for sink in case.trace.state if sink.kind in kinds]
    return ("no", _told(bad)) if bad else ("yes", "parameters, buffers and optimizer state")


def _output_finite(case: Case) -> Reply:
    outputs = case.trace.outputs
    if not outputs:
        return _unknown("the root module was not called as a whole")
    bad = [sink for sink in outputs if not sink.is_finite]
    return ("no", _told(bad)) if bad else ("yes", f"{_plural(len(outputs), 'tensor')} returned")


def _terms_finite(case: Case) -> Reply:
    if not case.run.terms:
        finite = math.isfinite(case.run.loss)
        return "yes" if finite else "no", f"one scalar, {case.run.loss:.4g}"
    bad = [f"{t.name} = {t.value}" for t in case.run.terms if not math.isfinite(t.value)]
    return ("no", ", ".join(bad)) if bad else ("yes", _plural(len(case.run.terms), "term"))


def _told(sinks: Iterable[Sink]) -> str:
    rows = [f"{s.name}: {s.facts.nonfinite} of {s.facts.numel} non-finite" for s in sinks]
    return "; ".join(rows[:3]) + (f"; {len(rows) - 3} more" if len(rows) > 3 else "")


# -- precision -------------------------------------------------------------------------------------

_HALVES = ("float16", "bfloat16")


def _loss_in_half(case: Case) -> Reply:
    outside = [
        event
        for event in case.trace.events
        if event.phase == "forward" and not event.module and _is_floating(event.dtype)
    ]
    counts = Counter(event.dtype for event in outside)
    labels = [f"{name} is {f.dtype}" for name, f in case.trace.batch if f.dtype in _HALVES]
    told = ", ".join(f"{count} {dtype}" for dtype, count in counts.most_common())
    evidence = "; ".join(filter(None, [f"ops outside the model: {told or 'none'}", *labels]))
    half = bool(labels) or any(dtype in _HALVES for dtype in counts)
    return "yes" if half else "no", evidence


def _is_floating(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat", "complex"))


def _gone_in(name: str) -> Callable[[Case], Reply]:
    wide = {"fp32": ("float32", "complex64"), "fp64": ("float64", "complex128")}[name]

    def ask(case: Case) -> Reply:
        run = case.variant(name)
        if case.run.is_finite:
            return _unknown("the step as given is finite")
        if run is None or run.raised is not None:
            return _unknown("not replayed" if run is None else f"raised {run.raised}")
        if run.is_finite:
            return "yes", f"finite, loss {run.loss:.4g}"
        if is_given(run):
            told = "that replay begins with a value that is non-finite"
            return ("no", told) if run.culprit == case.run.culprit else _unknown(told)
        if run.culprit_dtype not in wide:
            return _unknown(f"the culprit still ran in {run.culprit_dtype}")
        return "no", f"{_plain(run.culprit)} ran in {run.culprit_dtype} and failed there too"

    return ask


def _scale_fits(case: Case) -> Reply:
    scaled = [run for run in case.runs if not run.ablated and any("scale" in n for n in run.notes)]
    notes = [note for run in scaled for note in run.notes if "scale" in note]
    if notes:
        return "yes" if any(
            "fits" in n for n in notes
        ) else "no", f"{scaled[0].variant}: {notes[0]}"
    run = next((r for r in case.runs if r.scale is not None and r.is_finite), None)
    if run is None:
        return _unknown("no replay used a loss scale")
    return "yes", f"{run.variant} is finite at {run.scale:g}"


# -- the loss --------------------------------------------------------------------------------------


def _gone_without(case: Case) -> Reply:
    without = (a for a in case.ablations if a.mode == "without")
    tried = sorted(without, key=lambda a: not a.cures)
    if not tried:
        return _unknown("nothing was ablated")
    words = {True: "took effect", False: "took NO effect", None: "effect unknown"}
    told = "; ".join(
        f"{' + '.join(a.names)}: {'finite' if a.finite else 'still non-finite'}, "
        f"{words[a.took_effect]}"
        for a in tried[:3]
    )
    told += f"; {len(tried) - 3} more" if len(tried) > 3 else ""
    return "yes" if any(a.cures for a in tried) else "no", told


def _silent_term(case: Case) -> Reply:
    silent = [t.name for t in case.run.terms if t.value == 0.0 and not t.has_graph]
    if not case.run.terms:
        return _unknown("the loss is one scalar without named terms")
    return ("yes", ", ".join(silent)) if silent else ("no", "every term has a graph or is not 0")


def _weight_differs(case: Case) -> Reply:
    if not case.configured:
        return _unknown("the subject does not say what was configured")
    different = [
        f"{name}: configured {value:g}, live {case.weights[name]:g}"
        for name, value in case.configured.items()
        if name in case.weights and case.weights[name] != value
    ]
    return (
        ("yes", "; ".join(different)) if different else ("no", f"{len(case.configured)} compared")
    )


def _near_twins(case: Case) -> Reply:
    if not case.weights:
        return _unknown("the subject names no weights")
    told = "; ".join(
        " and ".join(f"{name} ({case.weights.get(name, math.nan):g})" for name in pair)
        for pair in case.twins
    )
    return ("yes", told) if told else ("no", "among the weights in question")


# -- near the culprit ------------------------------------------------------------------------------


def _edge_nearby(case: Case) -> Reply:
    birth = case.birth
    if birth is None:
        return _unknown("no birth was read")
    if birth.spectrum is not None and birth.spectrum.tied:
        spectrum = birth.spectrum
        return "yes", f"{spectrum.tied} of {spectrum.matrices} matrices have tied values"
    for operand in birth.operands:
        for count, what in ((operand.at_zero, "0"), (operand.at_one, "±1")):
            if count:
                return "yes", f"{operand.role} is exactly {what} at {count} of {birth.count}"
    return "no", "no zero, tie or ±1 among the operands at the offending elements"


def _asked_infinity(case: Case) -> Reply:
    asked = [event for event in case.trace.events if event.asked]
    if not asked:
        return "no", "none was written down in this step"
    return "yes", "; ".join(dict.fromkeys(_place(event) for event in asked[:3]))


_SANITISERS = ("aten::nan_to_num", "aten::nan_to_num_")


def _sanitised(case: Case) -> Reply:
    # No formula of torch's own calls nan_to_num in the backward: a hook or a step of the user does.
    found = [
        event
        for event in case.trace.events
        if event.phase != "forward"
        and event.op in _SANITISERS
        and not all(facts.is_finite for facts in event.inputs)
    ]
    if found:
        return "yes", "; ".join(dict.fromkeys(_place(event) for event in found[:3]))
    return "no", "inside this step; a training loop around it was not seen"


def _without_gradient(case: Case) -> Reply:
    if not case.run.groups:
        return _unknown("the step ended before its gradients were looked at")
    names = case.trace.without_gradient
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return ("yes", shown) if names else ("no", f"all {case.run.parameters} get one")


def _place(event: OpEvent) -> str:
    line = f" at {event.frame.file.rsplit('/', 1)[-1]}:{event.frame.line}" if event.frame else ""
    return f"{_plain(event.op)}{line}"


# -- does it come again ----------------------------------------------------------------------------

# Ops that torch documents as possibly different from run to run, on CUDA above all.
_UNSTEADY = (
    "scatter_add", "scatter_reduce", "index_add", "index_put", "index_copy", "bincount", "cumsum",
    "ctc_loss", "upsample", "grid_sampler", "max_unpool", "embedding_bag", "nll_loss2d", "histc",
)  # fmt: skip


def _deterministic(case: Case) -> Reply:
    if case.deterministic is None:
        return _unknown("two native replays were not compared")
    if case.deterministic:
        return "yes", "two native replays agree to the bit"
    ops = {_plain(event.op) for event in case.trace.events}
    known = sorted(op for op in ops if op.startswith(_UNSTEADY))
    return "no", f"known not to be: {', '.join(known)}" if known else "no op known for it was seen"


def _same(samples: tuple[Sample, ...], case: Case, what: str) -> Reply:
    if not samples:
        return _unknown("not replayed")
    failed = [sample for sample in samples if not sample.finite]
    expected = 0 if case.run.is_finite else len(samples)
    told = ", ".join(f"{s.value} {'finite' if s.finite else 'non-finite'}" for s in samples)
    return "yes" if len(failed) == expected else "no", f"{what} {told}"


def _unknown(why: str) -> Reply:
    return "cannot tell", why


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _plain(op: str | None) -> str:
    return (op or "none").rsplit("::", maxsplit=1)[-1]


QUESTIONS: tuple[tuple[str, str, Callable[[Case], Reply]], ...] = (
    ("inputs_finite", "inputs finite?", _inputs_finite),
    ("state_finite", "parameters and buffers finite before?", _state_finite),
    ("output_finite", "network output finite?", _output_finite),
    ("terms_finite", "every loss term finite?", _terms_finite),
    ("loss_in_half", "labels or loss in half precision?", _loss_in_half),
    ("gone_in_fp32", "gone in FP32?", _gone_in("fp32")),
    ("gone_in_fp64", "gone in FP64?", _gone_in("fp64")),
    ("gone_without", "gone without a term?", _gone_without),
    ("edge_nearby", "a zero, a tie or an edge at the culprit?", _edge_nearby),
    ("silent_term", "a term silently 0?", _silent_term),
    ("weight_differs", "a weight other than configured?", _weight_differs),
    ("near_twins", "weights with near-twin names?", _near_twins),
    ("without_gradient", "a parameter without gradient?", _without_gradient),
    ("sanitised", "gradients sanitised before the check?", _sanitised),
    ("asked_infinity", "an infinity that was asked for?", _asked_infinity),
    ("scale_fits", "a loss scale that fits?", _scale_fits),
    ("deterministic", "deterministic?", _deterministic),
    ("other_sizes", "the same at other batch sizes?", lambda c: _same(c.sizes, c, "B =")),
    ("other_seeds", "the same from other initialisations?", lambda c: _same(c.seeds, c, "seed")),
)
