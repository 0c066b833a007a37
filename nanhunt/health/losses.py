"""Rules over the loss of a run."""

from statistics import median

from nanhunt.health.course import Course, error_of_median, spread
from nanhunt.health.symptom import Answer, Shown, Unknown


def find_nonfinite(course: Course) -> Answer:
    """Losses that are not finite; a step that raised has none."""
    hit = [i for i, f in enumerate(course.figures) if f.loss is None and f.why != "raised"]
    told = f"in {len(hit)} of {len(course.figures)} steps"
    return Shown(hit[0], hit[-1], (told,)) if hit else None


def find_nonfinite_validation(course: Course) -> Answer:
    """Validation losses that are not finite."""
    told = [i for i, f in enumerate(course.figures) if f.validated]
    if not told:
        return Unknown("no validation loss was told")
    hit = [i for i in told if course.figures[i].validation is None]
    evidence = f"{len(hit)} of {len(told)} validation losses"
    return Shown(hit[0], hit[-1], (evidence,)) if hit else None


def find_flat(course: Course) -> Answer:
    """A loss of which a fall can be ruled out; one that is too noisy for that cannot be judged."""
    limits, losses = course.limits, course.losses
    if len(losses) < limits.course:
        return Unknown(f"{len(losses)} steps with a finite loss; {limits.course} would do")
    size = max(limits.block, len(losses) // 10)
    parts = [[loss for _, loss in losses[k : k + size]]
             for k in range(0, len(losses) - size + 1, size)]  # fmt: skip
    first = median(parts[0])
    best = min(parts[1:], key=median)
    fall = first - median(best)
    doubt = 2 * (error_of_median(parts[0]) ** 2 + error_of_median(best) ** 2) ** 0.5
    if fall > max(doubt, 1e-3 * abs(first)):
        return None
    if doubt > limits.fall * abs(first):
        return Unknown(
            f"the loss is too noisy: {first:.3g} at first, known to {doubt:.2g} (2 standard errors)"
        )
    highest, last = max(map(median, parts)), median(parts[-1])
    is_flat = highest - min(first, median(best)) <= max(2 * doubt, limits.flat * abs(first))
    if not is_flat and not (last == highest and last - first > abs(first)):
        return Unknown(
            f"the loss wanders from {median(best):.3g} to {highest:.3g} and does not fall: "
            f"so does one of two losses that play against each other"
        )
    told = f"{first:.4g} in the first {size} steps, at best {median(best):.4g} later (medians)"
    return Shown(losses[0][0], losses[-1][0], (told,))


def find_spikes(course: Course) -> Answer:
    """A loss that leaps for several steps, and comes back or is gone for good."""
    limits, losses = course.limits, course.losses
    if len(losses) < limits.window + limits.spike_steps:
        wanted = limits.window + limits.spike_steps
        return Unknown(f"{len(losses)} steps with a finite loss; {wanted} would do")
    found: list[tuple[int, int, float, float]] = []
    start = limits.window
    while start <= len(losses) - limits.spike_steps:
        spike = _spike(course, start)
        if spike is None:
            start += 1
            continue
        end, level, is_spike = spike
        if is_spike:
            peak = max(loss for _, loss in losses[start : end + 1])
            found.append((losses[start][0], losses[end][0], level, peak))
        start = end + 1
    if not found:
        return None
    worst = max(found, key=lambda each: each[3] - each[2])
    told = f"from {worst[2]:.3g} to {worst[3]:.3g} at step {course.step(worst[0])}"
    many = (f"{len(found)} times",) if len(found) > 1 else ()
    return Shown(found[0][0], found[-1][1], (*many, told))


def _spike(course: Course, start: int) -> tuple[int, float, bool] | None:
    """Where a leap at a position ends, from what level it came, and whether it is a spike."""
    limits, losses = course.limits, course.losses
    lowest = min(loss for _, loss in losses[start : start + limits.spike_steps])
    before = [loss for _, loss in losses[start - limits.window : start]]
    if lowest <= max(before[-limits.spike_steps :]):
        return None  # cheap, and true nearly always
    level = median(before)
    moved = course.moved(start)
    bound = max(
        limits.spike * spread(before), limits.spike_part * moved, limits.spike_rise * abs(level)
    )
    foot = min(before[-limits.spike_steps - 1 :])
    if lowest - level <= bound or foot - level > bound / 4:
        return None  # too low, or a slope and no leap
    end = next((j for j in range(start, len(losses)) if losses[j][1] - level <= bound / 2),
               len(losses))  # fmt: skip
    is_back = end - start <= limits.recovered and end < len(losses)
    is_gone = median(loss for _, loss in losses[start:end]) - level > limits.departure * moved > 0
    is_spike = is_back or is_gone or _has_settled(course, start, level)
    return end - 1, level, is_spike and not _is_restart(course, start)


def _has_settled(course: Course, start: int, level: float) -> bool:
    """Whether a leap was over in a few steps, and the loss is worse for good."""
    begin = start + course.limits.settling
    after = [loss for _, loss in course.losses[begin : begin + course.limits.window]]
    if len(after) < course.limits.block:
        return False
    peak = max(loss for _, loss in course.losses[start:begin])
    return median(after) - level <= course.limits.remnant * (peak - level)


def _is_restart(course: Course, start: int) -> bool:
    """Whether the learning rate was raised shortly before."""
    near = course.losses[start - course.limits.window : start + 1]
    rates = [max(course.figures[i].rates, default=0.0) for i, _ in near]
    return rates[-1] > 1.5 * min(rates)
