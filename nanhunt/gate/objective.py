"""Does everything learn: parameters without a gradient, silent terms, weights that are not live."""

import math
from collections.abc import Iterator, Mapping

from nanhunt.gate.case import Case, Found, title
from nanhunt.records import Term


def check_learning(case: Case) -> Iterator[Found]:
    """NH004, of the step as given."""
    run = case.native
    for name in run.without_gradient:
        yield Found("finding", f"{name} receives no gradient", "native", name)
    if not run.without_gradient:
        count = run.parameters
        yield Found("passed", f"all {count} trainable parameters receive a gradient", "native")


def check_terms(case: Case) -> Iterator[Found]:
    """NH005: of the step as given, and where a variant silences a further term."""
    weights = dict(case.report.weights)
    known: set[str] = set()
    for run in case.given:
        if run.raised is not None:
            yield Found("not run", f"the variant raised {run.raised}", title(run))
            continue
        if not run.terms:
            yield Found("not run", "the loss is one scalar without named terms", title(run))
            continue
        is_sum = math.isclose(sum(t.value for t in run.terms), run.loss, rel_tol=1e-3)
        silent = {t.name: _silence(t, weights, is_sum=is_sum) for t in run.terms}
        silent = {name: why for name, why in silent.items() if why and name not in known}
        known.update(silent)
        for name, why in silent.items():
            yield Found("finding", f"term {name} {why}", title(run), name)
        if not known:
            yield Found("passed", f"none of {len(run.terms)} terms is silent", title(run))


def _silence(term: Term, weights: Mapping[str, float], *, is_sum: bool) -> str:
    """Why a term teaches nothing; empty where it does, or where its weight says that it is off."""
    if any(weights[w] == 0.0 for w in weights if w == term.name or w.endswith(f"_{term.name}")):
        return ""
    graph = "" if term.has_graph else ", and it has no graph"
    if term.value == 0.0:
        return f"is exactly 0{graph}"
    # Where the terms are not what is summed, one without a graph may be a figure for the log.
    return f"is {term.value:.4g} and has no graph" if graph and is_sum else ""


def check_weights(case: Case) -> Iterator[Found]:
    """NH006, of the live objective."""
    live = dict(case.report.weights)
    wanted = {**dict(case.report.configured), **case.rule.weights}
    if not wanted:
        yield Found("not run", "neither the subject nor [tool.nanhunt] names configured weights")
        return
    wrong = 0
    for name, value in wanted.items():
        # What is configured as 0 need not be there at all.
        if math.isclose(live.get(name, 0.0), value, rel_tol=1e-6) and (name in live or not value):
            continue
        wrong += 1
        held = f"holds {live[name]:g}" if name in live else "does not know it"
        told = f"{name} is configured as {value:g} and the live objective {held}"
        twins = [b if a == name else a for a, b in case.report.twins if name in (a, b)]
        near = f" (near twin: {', '.join(twins)})" if twins else ""
        yield Found("finding", told + near, name=name)
    if not wrong:
        yield Found("passed", f"{len(wanted)} weights are as configured")
