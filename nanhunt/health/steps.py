"""Rules over steps that were not made, the loss scale, the scheduler and the learning rate."""

from collections.abc import Sequence

from nanhunt.health.course import Course, stretches
from nanhunt.health.symptom import Answer, Shown, Unknown

_WORDS = {
    "scaler": "overflow under the loss scale",
    "nonfinite": "gradients not finite",
    "loss": "loss not finite",
    "parameters": "parameters not finite",
    "ranks": "another process skips",
    "raised": "the step raised",
    "": "no reason told",
}


def find_skipped(course: Course) -> Answer:
    """Many steps in a row that were not made."""
    limits, figures = course.limits, course.figures
    for start, end in stretches([not f.stepped for f in figures]):
        overflows = sum(f.why == "scaler" for f in figures[start : end + 1])
        others = end - start + 1 - overflows
        if others >= limits.skipped or overflows >= limits.overflows:
            return Shown(start, end, (f"{end - start + 1} in a row", _reasons(course, start, end)))
    return None


def _reasons(course: Course, start: int, end: int) -> str:
    counts: dict[str, int] = {}
    for f in course.figures[start : end + 1]:
        if not f.stepped:
            counts[_WORDS[f.why]] = counts.get(_WORDS[f.why], 0) + 1
    return ", ".join(f"{words}: {count}" for words, count in counts.items())


def find_often_skipped(course: Course) -> Answer:
    """A part of all steps that is lost for good, scattered over the run."""
    limits, figures = course.limits, course.figures
    start = next((i for i, f in enumerate(figures) if f.stepped), len(figures))
    rest = figures[start:]
    if len(rest) < limits.course:
        return Unknown(f"{len(rest)} steps from the first that was made; {limits.course} would do")
    lost = [i for i, f in enumerate(rest, start=start) if not f.stepped]
    if len(lost) < limits.skipped_part * len(rest):
        return None
    told = f"{len(lost)} of {len(rest)} steps since the first that was made"
    return Shown(lost[0], lost[-1], (told, _reasons(course, start, len(figures) - 1)))


def find_scale_collapse(course: Course) -> Answer:
    """A loss scale below 1."""
    scales = [(i, f.scale) for i, f in enumerate(course.figures) if f.scale is not None]
    low = [(i, scale) for i, scale in scales if scale < course.limits.scale]
    if not low:
        return None
    highest, lowest = max(s for _, s in scales), min(s for _, s in low)
    return Shown(low[0][0], low[-1][0], (f"from {highest:g} down to {lowest:g}",))


def find_scheduler_alone(course: Course) -> Answer:
    """The scheduler steps although the optimizer did not."""
    hit = [i for i, f in enumerate(course.figures) if f.scheduled and not f.stepped]
    skipped = sum(not f.stepped for f in course.figures)
    told = f"in {len(hit)} of the {skipped} steps that the optimizer did not make"
    return Shown(hit[0], hit[-1], (told,)) if hit else None


def find_optimizer_alone(course: Course) -> Answer:
    """The scheduler is left out: never stepped in a long run, or forgotten in some steps."""
    made = [i for i, f in enumerate(course.figures) if f.stepped and f.scheduled is not None]
    if not made:
        return None
    alone = [i for i in made if not course.figures[i].scheduled]
    others = len(made) - len(alone)
    if not others:
        if len(made) < course.limits.constant:
            wanted = course.limits.constant
            return Unknown(
                f"not stepped in {len(made)} steps; once an epoch would do, so {wanted} are needed"
            )
        return Shown(alone[0], alone[-1], (f"never stepped in {len(made)} steps",))
    if alone and others >= len(alone):  # else once an epoch, or every so many steps
        told = f"not stepped in {len(alone)} of {len(made)} steps that the optimizer made"
        return Shown(alone[0], alone[-1], (told,))
    return None


def find_rate_zero(course: Course) -> Answer:
    """Steps in a row with a learning rate of 0 in every group."""
    marks = [bool(f.rates) and not any(f.rates) for f in course.figures]
    for start, end in stretches(marks):
        if end - start + 1 >= course.limits.idle:
            return Shown(start, end, (f"{end - start + 1} steps in a row",))
    return None


def find_rate_constant(course: Course) -> Answer:
    """A scheduler that steps and changes nothing."""
    hit = [i for i, f in enumerate(course.figures) if f.scheduled and f.rates]
    rates: Sequence[tuple[float, ...]] = [f.rates for f in course.figures if f.rates]
    if not hit or len(set(rates)) > 1:
        return None
    if len(hit) < course.limits.constant:
        wanted = course.limits.constant
        return Unknown(f"the scheduler was stepped {len(hit)} times; {wanted} would do")
    told = f"{', '.join(f'{rate:g}' for rate in rates[0])} in all of {len(rates)} steps"
    return Shown(hit[0], hit[-1], (told, f"the scheduler was stepped {len(hit)} times"))
