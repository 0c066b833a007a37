"""Rules over what the optimizer does to the parameters."""

from statistics import median

from nanhunt.health.course import Course, Series
from nanhunt.health.symptom import Answer, Shown, Unknown


def find_unmoved(course: Course) -> Answer:
    """Groups that stay where they are although the optimizer steps."""
    late = _late(course)
    if isinstance(late, Unknown):
        return late
    limits = course.limits
    still = {n: s for n, s in late.items() if max(ratio for _, ratio in s) <= limits.unmoved}
    if not still or (len(still) == len(late) and course.is_learning()):
        return None  # a run that has arrived
    told = [f"{name}: ‖Δθ‖/‖θ‖ at most {max(ratio for _, ratio in series):.2g} "
            f"in {len(series)} measured steps" for name, series in still.items()]  # fmt: skip
    return _shown(still, told)


def find_ratio(course: Course) -> Answer:
    """Updates that are small or large beside the weights, in a way that hurts."""
    late = _late(course)
    if isinstance(late, Unknown):
        return late
    limits, is_learning = course.limits, course.is_learning()
    found = {}
    for name, series in late.items():
        ratio = median(ratio for _, ratio in series)
        is_small = limits.unmoved < ratio < limits.slow and not is_learning
        is_large = ratio > (limits.replaced if is_learning else limits.fast)
        if is_small or is_large:
            found[name] = (series, ratio)
    told = [f"{name}: ‖Δθ‖/‖θ‖ {ratio:.2g} (median); usual is 1e-3"
            for name, (_, ratio) in found.items()]  # fmt: skip
    return _shown({name: series for name, (series, _) in found.items()}, told) if found else None


def _late(course: Course) -> dict[str, Series] | Unknown:
    """The later half of what was measured of each group: parameters that begin at 0 leap first."""
    enough = {name: series for name, series in course.updates.items()
              if len(series) >= course.limits.measured}  # fmt: skip
    if not enough:
        most = max(map(len, course.updates.values()), default=0)
        return Unknown(f"updates were measured in {most} steps; {course.limits.measured} would do")
    return {name: series[len(series) // 2 :] for name, series in enough.items()}


def _shown(groups: dict[str, Series], told: list[str]) -> Shown:
    first = min(series[0][0] for series in groups.values())
    last = max(series[-1][0] for series in groups.values())
    return Shown(first, last, tuple(told))
