"""Runs and ablations side by side: what the precisions, the weights and the terms show."""

import math
from collections.abc import Mapping, Sequence

from nanhunt.records import Ablation, Run, Term, Trace


def describe_nonfinite(run: Run) -> str:
    """One sentence on what is non-finite after a run."""
    trained = sum(group.parameters - group.without_gradient for group in run.groups)
    if run.raised is not None:
        return f"the step raised {run.raised}"
    if not math.isfinite(run.loss):
        return f"the loss is {run.loss}"
    if run.nonfinite:
        return (
            f"the loss is finite ({run.loss:.4g}); {run.nonfinite} of {trained} gradients are not"
        )
    if run.stepped_nonfinite:
        return (
            f"loss and gradients are finite; after the optimizer step {run.stepped_nonfinite} of "
            f"{run.parameters} parameters are not"
        )
    return f"the loss ({run.loss:.4g}) and {trained} gradients are finite"


_HALVES = ("float16", "bfloat16")
_WIDE = ("float64", "complex128")


def judge_precision(runs: Sequence[Run]) -> str:
    """What the precisions show about a failure of the native run, as far as they can.

    An FP64 replay says something only if the culprit really ran in FP64.
    """
    by_name = {run.variant: run for run in runs if not run.ablated}
    native, double, single = (by_name.get(name) for name in ("native", "fp64", "fp32"))
    if native is None or native.is_finite or (double is None and single is None):
        return ""
    sentences = [
        f"{run.variant} cannot tell: it raised {run.raised}"
        for run in (double, single)
        if run is not None and run.raised is not None
    ]
    if single is not None and single.is_finite:
        sentences.append("a fault of range or rounding in half precision: gone in fp32")
    elif double is not None and double.is_finite:
        remains = ", not in fp32" if single is not None and single.raised is None else ""
        sentences.append(f"a fault of rounding or range: gone in fp64{remains}")
    elif double is not None and double.raised is None:
        sentences.append(_failed_in_double(native, double))
    return "; ".join(sentences)


def _plain(op: str | None) -> str:
    return op.removeprefix("aten::") if op else "none found"


# How the culprit of a run is called that no op of its step has made.
_GIVEN = ("input", "parameter", "buffer", "optimizer state")


def is_given(run: Run) -> bool:
    """Whether what failed in a run was non-finite before the step that it replays."""
    return run.culprit in _GIVEN


def _failed_in_double(native: Run, double: Run) -> str:
    if is_given(double) and double.culprit == native.culprit:
        return f"not a precision fault: the {double.culprit} is non-finite before the step"
    if is_given(double):
        # An op of an earlier step made it, and that one is not replayed.
        return "fp64 cannot tell: its replay begins with a value that is non-finite"
    if double.culprit_dtype in _WIDE and double.culprit == native.culprit:
        return (
            f"not a precision fault: {_plain(double.culprit)} ran in {double.culprit_dtype} and "
            f"failed there too"
        )
    if double.culprit_dtype in _WIDE:
        return f"fp64 fails as well, but at another op: {_plain(double.culprit)}"
    return f"fp64 cannot tell: the op still ran in {double.culprit_dtype or 'an unknown dtype'}"


def judge_ablation(
    name: str, before: Run, after: Run, weights: tuple[Mapping[str, float], Mapping[str, float]]
) -> Ablation:
    """Whether taking one weight or term out took effect, and what came of it.

    Args:
        name: the weight or term.
        before: the native run.
        after: the native run without it.
        weights: what the live objective held in each of the two.

    Returns:
        The ablation. It took effect when no op of the term is left in the backward; a weight that
        was 0 before cannot take effect, and an objective that neither shows ops nor changes its
        value cannot tell.
    """
    was, now = weights[0].get(name), weights[1].get(name)
    changed = _changed_term(name, before, after)
    ops_before = (changed.forward_ops, changed.backward_ops) if changed else None
    left = next((t for t in after.terms if changed and t.name == changed.name), None)
    ops_after = ((left.forward_ops, left.backward_ops) if left else (0, 0)) if changed else None
    return Ablation(
        names=(name,),
        mode="without",
        requested=True,
        finite=after.is_finite,
        took_effect=None
        if after.raised is not None
        else _took_effect(was, now, ops_after, loss_changed=_differ(before.loss, after.loss)),
        weight_before=was,
        weight_after=now,
        ops_before=ops_before,
        ops_after=ops_after,
        loss=after.loss,
        groups=after.groups,
        raised=after.raised,
    )


def _differ(one: float, other: float) -> bool:
    return one != other and not (math.isnan(one) and math.isnan(other))


def _took_effect(
    was: float | None, now: float | None, ops: tuple[int, int] | None, *, loss_changed: bool
) -> bool | None:
    if was == 0.0 or (now is not None and now != 0.0):
        return False
    if ops is not None:
        return ops[1] == 0
    return True if loss_changed else None


def _changed_term(name: str, before: Run, after: Run) -> Term | None:
    """The term that a weight or term name stands for: by its name, else by what changed."""
    by_name = {term.name: term for term in before.terms}
    if name in by_name:
        return by_name[name]
    rest = {term.name: term.value for term in after.terms}
    gone = [term for term in before.terms if term.name not in rest]
    zeroed = [t for t in before.terms if t.value != 0.0 and rest.get(t.name) == 0.0]
    changed = gone or zeroed
    return changed[0] if len(changed) == 1 else None


def confusable_names(names: Sequence[str], of: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Pairs of names that are easily taken for each other, one of each pair among `of`.

    Such are two names of which one holds all the words of the other: `lam_align` and
    `lam_subspace_align`. The case that taught it: one was set to 0, the other was live.
    """
    pairs: dict[tuple[str, str], None] = {}
    for one in of:
        for other in names:
            words, others = set(one.split("_")), set(other.split("_"))
            if one != other and len(words & others) > 1 and (words < others or others < words):
                pairs[min(one, other), max(one, other)] = None
    return tuple(pairs)


_DECOMPOSITIONS = ("LinalgEigh", "LinalgSvd", "LinalgEig")


def vector_use(trace: Trace) -> tuple[str, ...]:
    """For every decomposition in the backward: values only, or vectors used.

    With values only the backward never divides, and is finite even for repeated values.
    """
    runs: dict[int, tuple[int, bool]] = {}
    for event in trace.events:
        if event.phase == "backward" and (event.node or "").startswith(_DECOMPOSITIONS):
            divides = event.op in ("aten::div", "aten::div_")
            number, before = runs.get(event.node_run, (event.number or 0, False))
            runs[event.node_run] = (number, before or divides)
    made = {e.made: e for e in reversed(trace.events) if e.phase == "forward"}
    sentences = []
    for number, divides in runs.values():
        origin = made.get(number)
        term = ", ".join(trace.owners.get(number, ()))
        where = f"term {term}" if term else origin.module if origin else ""
        op = origin.op.removeprefix("aten::").strip("_") if origin else "decomposition"
        use = "vectors used" if divides else "values only, its backward never divides"
        sentences.append(f"{op}{f' in {where}' if where else ''}: {use}")
    return tuple(dict.fromkeys(sentences))
