"""Every rule asked of a run, and what it answered."""

from collections.abc import Sequence
from dataclasses import dataclass

from nanhunt.health.course import Course, without_nonfinite
from nanhunt.health.limits import LIMITS, Limits
from nanhunt.health.symptom import Shown, Symptom, Unknown
from nanhunt.health.table import RULES, Rule
from nanhunt.records import Figures


@dataclass(frozen=True, slots=True)
class Checkup:
    """What every rule answered: symptoms, what cannot be told and why, and what is fine."""

    symptoms: tuple[Symptom, ...]
    unknown: tuple[tuple[str, str], ...]
    absent: tuple[str, ...]


def check(figures: Sequence[Figures], *, limits: Limits = LIMITS) -> Checkup:
    """Ask every rule of the table."""
    course = Course(without_nonfinite(figures), limits)
    answers = [(rule, rule.find(course) if figures else Unknown("no steps")) for rule in RULES]
    symptoms = [_symptom(rule, a, course) for rule, a in answers if isinstance(a, Shown)]
    unknown = [(rule.slug, a.why) for rule, a in answers if isinstance(a, Unknown)]
    absent = [rule.slug for rule, a in answers if a is None]
    return Checkup(tuple(symptoms), tuple(unknown), tuple(absent))


def examine(figures: Sequence[Figures], *, limits: Limits = LIMITS) -> tuple[Symptom, ...]:
    """The symptoms that the figures of a run show, in the order of the table."""
    return check(figures, limits=limits).symptoms


def _symptom(rule: Rule, shown: Shown, course: Course) -> Symptom:
    first, last = course.step(shown.first), course.step(shown.last)
    return Symptom(rule.slug, rule.title, first, last, shown.evidence, rule.advice)
