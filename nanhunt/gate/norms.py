"""Are the gradient norms within bounds, and near those of the baseline?"""

import math
from collections.abc import Iterator, Mapping

from nanhunt.gate.case import Case, Found, title
from nanhunt.gate.policy import Bounds


def check_bounds(case: Case) -> Iterator[Found]:
    """NH007, of every finite run with the whole objective."""
    limits = case.rule.limits
    if not limits.has_bounds:
        yield Found("not run", "[tool.nanhunt] thresholds give no norm, norms, ratio or ratios")
        return
    for run in case.given:
        if not run.is_finite:
            yield Found("not run", "the variant is not finite", title(run))
            continue
        norms = {group.name: group.norm for group in run.groups}
        unknown = {*limits.norms, *(n for pair in limits.ratios for n in pair)} - set(norms)
        for name in sorted(unknown):
            known = ", ".join(norms)
            told = f"no group of parameters is called {name!r}; groups: {known}"
            yield Found("not run", told, title(run), name)
        beyond = list(_beyond(case, norms))
        yield from (Found("finding", told, title(run), name) for name, told in beyond)
        if not beyond:
            yield Found("passed", _norms(norms), title(run))


def _beyond(case: Case, norms: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Every norm and every ratio that is out of its bounds."""
    limits = case.rule.limits
    for name, norm in norms.items():
        bounds = limits.norms.get(name, limits.norm)
        if bounds is not None and not _within(norm, bounds):
            yield name, f"the gradient norm of {name} is {norm:.4g}, outside {_range(bounds)}"
    for (one, other), bounds in limits.ratios.items():
        if one in norms and other in norms:
            ratio = ratio_of(norms[one], norms[other])
            if not _within(ratio, bounds):
                told = f"the gradient norms {one}/{other} are {ratio:.4g}, outside {_range(bounds)}"
                yield f"{one}/{other}", told
    if norms and limits.ratio < math.inf:
        large, small = max(norms, key=norms.__getitem__), min(norms, key=norms.__getitem__)
        ratio = ratio_of(norms[large], norms[small])
        if ratio > limits.ratio:
            told = (
                f"the gradient norm of {large} is {ratio:.4g} times that of {small}, "
                f"above {limits.ratio:g}"
            )
            yield f"{large}/{small}", told


def check_baseline(case: Case) -> Iterator[Found]:
    """NH008, of every finite run with the whole objective."""
    if case.norms is None:
        yield Found("not run", case.missing)
        return
    factor = case.rule.limits.baseline_factor
    for run in case.given:
        before = case.norms.get(run.variant)
        if not run.is_finite or before is None:
            why = "the baseline has no such variant: nanhunt gate --update-baseline"
            why = why if run.is_finite else "the variant is not finite"
            yield Found("not run", why, title(run))
            continue
        now = {group.name: group.norm for group in run.groups}
        moved = [*_moved(before, now, factor)]
        yield from (Found("finding", told, title(run), name) for name, told in moved)
        if not moved:
            told = f"{len(now)} groups within a factor {factor:g} of the baseline"
            yield Found("passed", told, title(run))


def _moved(
    before: Mapping[str, float], now: Mapping[str, float], factor: float
) -> Iterator[tuple[str, str]]:
    for name in dict.fromkeys((*before, *now)):
        if name not in now or name not in before:
            state = "is not a group any more" if name in before else "is not in the baseline"
            yield name, f"{name} {state}; nanhunt gate --update-baseline"
        elif not 1 / factor <= ratio_of(now[name], before[name]) <= factor:
            was, is_now = before[name], now[name]
            told = f"{was:.3g} in the baseline, {is_now:.3g} now: more than a factor {factor:g}"
            yield name, f"the gradient norm of {name} was {told}"


def ratio_of(one: float, other: float) -> float:
    """One over the other; equal where both are 0."""
    if other == 0.0:
        return 1.0 if one == 0.0 else math.inf
    return one / other


def _within(value: float, bounds: Bounds) -> bool:
    return bounds[0] <= value <= bounds[1]


def _range(bounds: Bounds) -> str:
    return f"[{bounds[0]:g}, {bounds[1]:g}]"


def _norms(norms: Mapping[str, float]) -> str:
    shown = [f"{name} {norm:.3g}" for name, norm in norms.items()]
    return ", ".join(shown[:6]) + (", …" if len(shown) > 6 else "")
