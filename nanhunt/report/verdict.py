"""What every form of a report says in the same words: the verdict, the place, the way, the notes.

Texts carry the style in which a word stands; the forms only lay them out.
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import PureWindowsPath
from typing import NamedTuple

from rich.text import Text

from nanhunt.records import Ablation, Finding, Report, Run, Step, Verdict
from nanhunt.report import trials
from nanhunt.report.layout import clean, half_of, number, said, short
from nanhunt.report.short import told_rank
from nanhunt.report.tables import BAD, GOOD, ODD, outcome, share


class _Tag(NamedTuple):
    """How a verdict is called, its colour, and what to say where the report has no headline."""

    word: str
    style: str
    default: str


_TAGS: dict[Verdict, _Tag] = {
    "healthy": _Tag("HEALTHY", GOOD, "loss and gradients are finite"),
    "culprit": _Tag("CULPRIT", BAD, "the step is non-finite"),
    "unexplained": _Tag("UNEXPLAINED", ODD, "the step is non-finite; cannot tell why"),
    "at_risk": _Tag("AT RISK", ODD, "finite natively, non-finite in another variant"),
}
_PROOFS: dict[bool | None, str] = {
    True: " (replayed)",
    False: ", but it took no effect: proves nothing",
    None: " (replayed; cannot tell whether it took effect)",
}
_REPEATED: dict[bool | None, tuple[str, ...]] = {
    True: ("two native replays agree to the bit",),
    False: ("two native replays do not agree to the bit",),
    None: (),
}
NO_CURE_SOUGHT = "not sought: no ablation was replayed"


class Title(NamedTuple):
    """The verdict in a word, its colour, and a sentence."""

    word: str
    style: str
    sentence: str


def title(report: Report) -> Title:
    """The verdict in one word and one sentence."""
    tag = _TAGS[report.verdict]
    is_plural = report.verdict == "culprit" and len(report.culprits) > 1
    word = f"{len(report.culprits)} CULPRITS" if is_plural else tag.word
    return Title(word, tag.style, report.headline or tag.default)


def subject(report: Report, numbers: int = 3) -> list[str]:
    """What was examined, with what, on what; versions to so many numbers."""
    samples = "" if report.samples is None else f", {report.samples} samples"
    threads = f", {report.threads} thread{'' if report.threads == 1 else 's'}"
    torch = _version(report, "torch", numbers)
    parts = [f"nanhunt{_version(report, 'nanhunt', numbers)}", report.subject]
    parts += [f"batch {report.batch}{samples}"]
    parts += [f"torch{torch}"] if torch else []
    return [*parts, report.device + (threads if report.device == "cpu" else "")]


def _version(report: Report, package: str, numbers: int) -> str:
    """The version of a package, to so many numbers, behind a space; nothing where not known."""
    version = dict(report.versions).get(package, "").split("+")[0]
    return f" {'.'.join(version.split('.')[:numbers])}" if version else ""


# --- one culprit ---------------------------------------------------------------------------------


def place(finding: Finding) -> Text:
    """The op and the half of the step, and what ran inside its node."""
    inside = " → ".join(filter(None, [finding.node, short(finding.formula_op or "")]))
    head = f"{short(finding.op)}, {half_of(finding)}"
    return said((head, f"bold {BAD}"), f" · {inside}" if inside else "")


def spot(finding: Finding) -> str:
    """The line of code, written so that terminals make a link of it."""
    if finding.file is None:
        return finding.where or "line of code not known"
    line = "" if finding.line is None else f":{finding.line}"
    return f"{finding.file}{line}" + (f" in {finding.function}" if finding.function else "")


def owner(report: Report, finding: Finding) -> str:
    """To whom it belongs: module, terms, dtype, and its step where there were several."""
    late = f"step {finding.step}" if report.pace and finding.phase != "data" else ""
    parts = [
        f"module {finding.module}" if finding.module else "",
        f"loss term{'s' * (len(finding.terms) > 1)} {finding.term}" if finding.term else "",
        finding.dtype,
        f"occurrence {finding.occurrence}" if finding.occurrence > 1 else "",
        late,
    ]
    return " · ".join(filter(None, parts))


def why(finding: Finding) -> str:
    """What follows from the evidence."""
    return finding.explanation or ("" if finding.cause else "no known cause matches the evidence")


def cause(finding: Finding) -> str:
    """The name of the cause and the command that explains it; empty where there is none."""
    return f"{finding.cause} · nanhunt explain {finding.cause}" if finding.cause else ""


def station(step: Step) -> str:
    """The module, else the line of code, else the op."""
    if step.module or step.frame is None:
        return step.module or short(step.op)
    return f"{PureWindowsPath(step.frame.file).name}:{step.frame.line}"


def stations(path: Sequence[Step]) -> list[tuple[str, list[Step]]]:
    """The way: neighbours that are called the same are one station, with its steps."""
    return [(name, list(steps)) for name, steps in groupby(path, station)]


def poisoned(finding: Finding) -> list[str]:
    """Per group, how many parameters are poisoned of how many."""
    return [f"{group} {count}/{total}" for group, count, total in finding.poisoned]


# --- without a culprit ---------------------------------------------------------------------------


def _risky(report: Report) -> list[Run]:
    """The variants in which a natively finite step is non-finite."""
    if report.verdict != "at_risk":
        return []
    ran = (run for run in report.runs if run.raised is None and not run.ablated)
    return [run for run in ran if not run.is_finite]


def risks(report: Report) -> list[Text]:
    """Each such variant in a sentence."""
    texts = []
    for run in _risky(report):
        words = f": loss {number(run.loss)}, {share(run.groups)} gradients non-finite"
        texts.append(said((run.variant, ODD), words))
    if texts and report.native is not None and report.native.is_finite:
        texts.append(said("native is finite"))
    return texts


def unplaced(report: Report) -> list[Text]:
    """Where it happened, as far as the runs tell, when the report holds no finding."""
    native = [report.native] if report.native is not None else []
    for run in _risky(report) or native:
        if run.culprit:
            dtype = f" · {run.culprit_dtype}" if run.culprit_dtype else ""
            return [said((short(run.culprit) + dtype, BAD)), said(run.culprit_line or "")]
    return [said("cannot tell: no op was found that made it out of finite numbers")]


# --- what cures it -------------------------------------------------------------------------------


def removals(report: Report) -> list[Ablation]:
    """What was taken out and replayed: the cures first, then what does not cure."""
    return sorted((a for a in report.ablations if a.mode == "without"), key=lambda a: not a.cures)


def removal(ablation: Ablation) -> tuple[str, Text]:
    """What was taken out, and what came of it."""
    proof = "" if ablation.raised is not None else _PROOFS[ablation.took_effect]
    return clean(" + ".join(ablation.names)), outcome(ablation) + said(proof)


def is_cure_unsought(report: Report) -> bool:
    """Whether neither an ablation nor a trial was replayed."""
    return not removals(report) and not report.trials


def advice(report: Report) -> str:
    """What is worth trying and was not; empty where a fix is proven."""
    recipes = trials.untried(report)
    if trials.best(report) is not None and any(t.is_proven for t in trials.fixes(report)):
        recipes = []
    return f"{', '.join(recipes)} (not replayed)" if recipes else ""


# --- notes ---------------------------------------------------------------------------------------


def facts(report: Report) -> list[str]:
    """Further measured facts."""
    told = (*report.notes, *map(told_rank, report.ranks))
    return [*told, *_harmless(report), *_REPEATED[report.deterministic]]


def _harmless(report: Report) -> list[str]:
    """That there are non-finite values which reached nobody."""
    count = len(report.harmless)
    if not count:
        return []
    lines = "1 line of code made" if count == 1 else f"{count} lines of code made"
    return [f"{lines} non-finite values that reached neither loss nor gradient (--harmless)"]


def replays(report: Report) -> list[str]:
    """What was replayed, and how long that took."""
    names = [" − ".join([run.variant, *run.ablated]) for run in report.runs]
    names += [f"{a.mode} {' + '.join(a.names)}" for a in report.ablations]
    return [*names, *([f"{number(report.seconds)} s"] if report.seconds else [])]


def is_doubtful(report: Report) -> bool:
    """Whether some replay of a healthy step was non-finite or raised."""
    return not all(run.is_finite for run in report.runs)
