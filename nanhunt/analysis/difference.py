"""What changed between two reports: of two commits, two precisions, two machines."""

import math
from collections.abc import Iterator, Mapping
from typing import TypeAlias

from nanhunt.records import Difference, Finding, Report, Run

Figures: TypeAlias = Mapping[str, float | str]

_SAME = 1e-6  # relative distance below which two numbers are told as equal


def compare(before: Report, after: Report) -> tuple[Difference, ...]:
    """Everything that is told of both and differs; times and counts of ops are left out."""
    return (
        *_plain("subject", before, after),
        *_pairs("version", dict(before.versions), dict(after.versions)),
        *_pairs("weight", _numbers(before.weights), _numbers(after.weights)),
        *_culprits(before, after),
        *_runs(before, after),
        *_pairs("without the term", _ablations(before), _ablations(after)),
        *_pairs("fix", _fixes(before), _fixes(after)),
        *_pairs("question", _answers(before), _answers(after)),
    )


def _plain(topic: str, before: Report, after: Report) -> Iterator[Difference]:
    for name in ("subject", "batch", "seed", "samples", "device", "threads", "verdict", "headline"):
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            yield Difference(topic, name, str(old), str(new))
    if before.deterministic != after.deterministic:
        words = {None: "not compared", True: "yes", False: "no"}
        old, new = words[before.deterministic], words[after.deterministic]
        yield Difference(topic, "deterministic", old, new)


def _culprits(before: Report, after: Report) -> Iterator[Difference]:
    """The same culprit is the same op of the same function, wherever its line has gone."""
    olds, news = ({_key(f): _told(f) for f in r.culprits} for r in (before, after))
    yield from _pairs("culprit", olds, news)


def _key(finding: Finding) -> str:
    return " · ".join(filter(None, [finding.op, finding.phase, finding.function, finding.where]))


def _told(finding: Finding) -> str:
    place = f"{finding.file}:{finding.line}" if finding.file else "line not known"
    return " · ".join(filter(None, [place, finding.cause, finding.dtype]))


def _runs(before: Report, after: Report) -> Iterator[Difference]:
    olds, news = ({_title(run): run for run in r.runs} for r in (before, after))
    for name in dict.fromkeys((*olds, *news)):
        old, new = olds.get(name), news.get(name)
        if old is None or new is None:
            yield Difference("run", name, _state(old), _state(new))
            continue
        yield from _pairs(f"run {name}", _figures(old), _figures(new))


def _title(run: Run) -> str:
    return run.variant + (f" − {', '.join(run.ablated)}" if run.ablated else "")


def _state(run: Run | None) -> str:
    if run is None:
        return ""
    return "finite" if run.is_finite else run.raised or f"{run.nonfinite}/{run.parameters}"


def _figures(run: Run) -> dict[str, float | str]:
    figures: dict[str, float | str] = {"state": _state(run), "loss": run.loss}
    figures |= {f"term {term.name}": term.value for term in run.terms}
    figures |= {f"‖g‖ {group.name}": group.norm for group in run.groups}
    figures |= {"culprit": run.culprit or "", "its dtype": run.culprit_dtype or ""}
    figures |= {"no gradient": ", ".join(run.without_gradient)}
    return figures


def _numbers(pairs: tuple[tuple[str, float], ...]) -> dict[str, float]:
    return dict(pairs)


def _ablations(report: Report) -> dict[str, str]:
    return {
        f"{a.mode} {', '.join(a.names)}": "finite" if a.finite else "non-finite"
        for a in report.ablations
    }


def _fixes(report: Report) -> dict[str, str]:
    found = {}
    for trial in report.trials:
        word = "finite" if trial.finite else "non-finite"
        name = f"{trial.recipe} at {', '.join(trial.sites)}" if trial.sites else trial.recipe
        found[name] = "proven" if trial.is_proven else word
    return found


def _answers(report: Report) -> dict[str, str]:
    return {answer.question: answer.answer for answer in report.diagnosis}


def _pairs(topic: str, olds: Figures, news: Figures) -> Iterator[Difference]:
    for name in dict.fromkeys((*olds, *news)):
        old, new = olds.get(name, ""), news.get(name, "")
        if not _is_same(old, new):
            yield Difference(topic, name, _shown(old), _shown(new))


def _is_same(old: float | str, new: float | str) -> bool:
    if isinstance(old, float | int) and isinstance(new, float | int):
        both_nan = math.isnan(old) and math.isnan(new)
        return both_nan or old == new or math.isclose(old, new, rel_tol=_SAME)
    return old == new


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"
