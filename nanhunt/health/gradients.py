"""Rules over the gradients of a run."""

from bisect import insort
from statistics import median

from nanhunt.health.course import Course, Series, stretches
from nanhunt.health.symptom import Answer, Shown, Unknown
from nanhunt.records import SANITISED

UNMEASURED = Unknown("no gradient norms were measured")


def find_nonfinite(course: Course) -> Answer:
    """Gradients that are not finite, other than what a GradScaler skips as it should."""
    marks = [
        f.why != "scaler" and (f.nonfinite > 0 or any(norm is None for _, norm in f.norms))
        for f in course.figures
    ]
    hit = [i for i, is_marked in enumerate(marks) if is_marked]
    if not hit:
        return None
    taken = sum(course.figures[i].stepped for i in hit)
    evidence = [f"in {len(hit)} of {len(course.figures)} steps"]
    evidence += [f"the optimizer stepped all the same in {taken} of them"] if taken else []
    groups = {name for i in hit for name, norm in course.figures[i].norms if norm is None}
    evidence += [f"groups: {', '.join(sorted(groups))}"] if groups else []
    return Shown(hit[0], hit[-1], tuple(evidence))


def find_exploding(course: Course) -> Answer:
    """Gradient norms that leave everything before them behind, while the loss does not fall."""
    totals = course.totals
    if not totals:
        return UNMEASURED
    sudden = _sudden(course, totals)
    if sudden is not None:
        return sudden
    if len(totals) < 2 * course.limits.block:
        return Unknown(f"{len(totals)} steps with finite norms; {2 * course.limits.block} would do")
    limits = course.limits
    marks, levels = _heights(course, totals)
    for start, end in stretches(marks):
        if end - start + 1 < limits.explosion_steps or _has_fallen(course, totals, start, end):
            continue
        last = _last(course, totals, start, limits.explosion * levels[start])
        peak = max(norm for _, norm in totals[start : last + 1])
        evidence = f"‖g‖ rose from {levels[start]:.3g} (median before) to {peak:.3g}"
        return Shown(totals[start][0], totals[last][0], (evidence,))
    return None


def _last(course: Course, totals: Series, start: int, bound: float) -> int:
    """The last norm of those that stay above a bound, a few below it left aside."""
    end = below = start
    while below < len(totals) and below - end <= course.limits.explosion_steps:
        if totals[below][1] > bound:
            end = below
        below += 1
    return end


def _heights(course: Course, totals: Series) -> tuple[list[bool], list[float]]:
    """Which norms are far above all blocks before theirs, and the median of these blocks."""
    size, limits = course.limits.block, course.limits
    marks, levels = [False] * len(totals), [0.0] * len(totals)
    before: list[float] = []
    for k in range(0, len(totals), size):
        if before:
            level = before[len(before) // 2]
            bound = max(limits.explosion * level, limits.above_highest * before[-1])
            for j in range(k, min(k + size, len(totals))):
                marks[j], levels[j] = totals[j][1] > bound, level
        insort(before, median(norm for _, norm in totals[k : k + size]))
    return marks, levels


def _has_fallen(course: Course, totals: Series, start: int, end: int) -> bool:
    """Whether the loss became lower than ever before while the gradients grew: a saddle left."""
    first, last = totals[start][0], totals[end][0]
    before = [loss for i, loss in course.losses if i < first]
    within = [loss for i, loss in course.losses if first <= i <= last]
    return bool(before and within) and median(within) < min(before)


def _sudden(course: Course, totals: Series) -> Answer:
    """Norms that rise a hundredfold within a few steps and end in one that is not finite."""
    known = dict(totals)
    for i, f in enumerate(course.figures):
        if f.why in ("scaler", "raised") or (f.loss is not None and not f.nonfinite):
            continue
        before = [known[j] for j in range(max(0, i - 500), i) if j in known]
        base = median(before[:-1]) if len(before) >= 4 else 0.0
        if i - 1 in known and base > 0 and known[i - 1] >= course.limits.explosion * base:
            told = f"‖g‖ was {before[-1]:.3g} in the last finite step, {base:.3g} (median) before"
            return Shown(i - 1, i, (told, f"step {f.step} is not finite"))
    return None


def find_vanishing(course: Course) -> Answer:
    """Groups that get as good as no gradient beside the others, or all of them from the start."""
    groups, limits = course.groups, course.limits
    if not groups:
        return UNMEASURED
    if len(course.totals) < limits.block:
        return Unknown(f"{len(course.totals)} steps with finite norms; {limits.block} would do")
    tail = course.totals[-limits.block :]
    since = tail[0][0]
    late = {
        name: median(norm for i, norm in series if i >= since)
        for name, series in groups.items()
        if series[-1][0] >= since
    }
    largest = max(late.values())
    if largest < limits.vanished:
        is_stuck = largest > 0 and not course.is_learning()
        words = f"‖g‖ {largest:.3g} in the last {limits.block} steps; the loss has not fallen"
        return Shown(since, tail[-1][0], (words,)) if is_stuck else None
    faint = {name: norm for name, norm in late.items() if 0 < norm < limits.vanished_part * largest}
    told = [f"{name}: ‖g‖ {norm:.3g}, {norm / largest:.1g} of the largest group's"
            for name, norm in faint.items()]  # fmt: skip
    return Shown(since, tail[-1][0], tuple(told)) if told else None


def find_dead(course: Course) -> Answer:
    """Groups whose gradient is exactly 0 up to the end of the run."""
    groups, limits = course.groups, course.limits
    if not groups:
        return UNMEASURED
    if len(course.totals) < limits.dead:
        return Unknown(f"{len(course.totals)} steps with finite norms; {limits.dead} would do")
    since = course.totals[-limits.dead][0]
    dead = {name: _dead_since(series, since) for name, series in groups.items()}
    found = {name: start for name, start in dead.items() if start is not None}
    if not found or (len(found) == len(groups) and course.is_learning()):
        return None  # a loss that is 0 everywhere because it is satisfied
    told = [f"{name}: ‖g‖ is 0 since step {course.step(start)}" for name, start in found.items()]
    return Shown(min(found.values()), course.totals[-1][0], tuple(told))


def _dead_since(series: Series, since: int) -> int | None:
    """Where the zeros at the end of a series began; None where they began after `since`."""
    start = None
    for i, norm in reversed(series):
        if norm != 0:
            break
        start = i
    return start if start is not None and start <= since else None


def find_sanitised(course: Course) -> Answer:
    """Gradients whose NaN were replaced before anybody looked at them."""
    hit = [i for i, f in enumerate(course.figures) if SANITISED in f.notes]
    told = f"noted in {len(hit)} of {len(course.figures)} steps"
    return Shown(hit[0], hit[-1], (told,)) if hit else None


def find_clipped(course: Course) -> Answer:
    """A limit of clipping that holds always, so that it sets the size of every step."""
    made = [i for i, f in enumerate(course.figures) if f.stepped]
    late = made[len(made) // 2 :]
    factors = [f.clipped for i in late if (f := course.figures[i]).clipped is not None]
    if all(f.clipped is None for f in course.figures):
        return None
    if len(late) < course.limits.course:
        wanted = 2 * course.limits.course
        return Unknown(f"{len(made)} steps were made; {wanted} would do")
    if len(factors) < course.limits.clipped_part * len(late):
        return None
    told = f"{len(factors)} of the last {len(late)} steps, scaled by {median(factors):.3g} (median)"
    return Shown(late[0], late[-1], (told,))
