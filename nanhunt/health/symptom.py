"""A symptom, and what a rule may answer."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Symptom:
    """Something that a run suffers from: in which steps, what was measured, what to do.

    `first` and `last` are the numbers of the first and the last step that show it.
    """

    slug: str
    title: str
    first: int
    last: int
    evidence: tuple[str, ...]
    advice: str


@dataclass(frozen=True, slots=True)
class Shown:
    """A rule applies: the positions of its first and its last step, and what was measured."""

    first: int
    last: int
    evidence: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unknown:
    """A rule cannot be judged, and why."""

    why: str


# None: the rule was judged, and does not apply.
Answer = Shown | Unknown | None
