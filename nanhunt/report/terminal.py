"""A report for the terminal: what broke and where, why, what cures it; then tables for doubters.

What was measured, what follows from it and what was replayed stand apart. Colour only repeats what
the words say, and nothing is wider than the console.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import PureWindowsPath
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from nanhunt.records import Ablation, Finding, Phase, Report, Run, Step, Verdict
from nanhunt.report import tables, trials
from nanhunt.report.layout import Sheet, beside, clean, clipped, number, said, short
from nanhunt.report.modules import around_culprit
from nanhunt.report.repro import sentence
from nanhunt.report.tables import BAD, FAINT, GOOD, ODD, outcome, share

PROSE = 100  # no line of prose is longer, however wide the console is
MARGIN = 11  # of where, why, measured, cause, cure
FOOT = 13  # of Path, Notes, Not checked
STATIONS = 6
SHOWN = 5  # ablations beside `cure`; all are in the table


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
_PLACES: dict[Phase, str] = {
    "data": "in what the step started from",
    "forward": "in the forward",
    "backward": "in its backward",
    "optimizer": "in the optimizer step",
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


def render(report: Report) -> RenderableType:
    """The report as something that a rich console prints at whatever width it has."""
    return Page(report)


@dataclass(frozen=True, slots=True)
class Page:
    """A report laid out when the width of the console is known."""

    report: Report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the sections with an empty line between them."""
        sheet = Sheet(console, options.max_width).inside(1)
        sections = _HEALTHY if self.report.verdict == "healthy" else _SECTIONS
        yield from _header(self.report, Sheet(console, options.max_width))
        for section in sections:
            for i, line in enumerate(section(self.report, sheet)):
                if i == 0:
                    yield Text()
                yield Text(" ") + line


def _header(report: Report, sheet: Sheet) -> list[Text]:
    """What was examined, with what, on what; with short versions where the line is short."""
    samples = "" if report.samples is None else f", {report.samples} samples"
    threads = f", {report.threads} thread{'' if report.threads == 1 else 's'}"
    place = report.device + (threads if report.device == "cpu" else "")
    middle = [report.subject, f"batch {report.batch}{samples}"]
    lines: list[Text] = []
    for numbers in (3, 2):
        torch = _version(report, "torch", numbers)
        parts = [f"nanhunt{_version(report, 'nanhunt', numbers)}", *middle]
        parts += [f"torch{torch}"] if torch else []
        lines = sheet.flowed([*parts, place], " · ")
        if len(lines) == 1:
            break
    return lines


def _version(report: Report, package: str, numbers: int) -> str:
    """The version of a package, to so many numbers, behind a space; nothing where not known."""
    version = dict(report.versions).get(package, "").split("+")[0]
    return f" {'.'.join(version.split('.')[:numbers])}" if version else ""


# --- the verdict ---------------------------------------------------------------------------------


def _verdict(report: Report, sheet: Sheet) -> list[Text]:
    """What is non-finite, then for each culprit where and why, then what cures the step."""
    lines = [*_headline(report, sheet), Text("─" * sheet.width, FAINT)]
    narrow = sheet.inside(max(sheet.width - PROSE, 0))
    many = len(report.culprits) > 1
    lines += _labelled("variant", _risks(report), narrow)
    for i, finding in enumerate(report.culprits, start=1):
        late = f"step {finding.step}" if report.pace and finding.phase != "data" else ""
        lines += _culprit(finding, f"{i} " if many else "", narrow, late=late)
    if not report.culprits:
        lines += _labelled("where", _unplaced(report), narrow)
    recipes = trials.untried(report)
    if trials.best(report) is not None and any(t.is_proven for t in trials.fixes(report)):
        recipes = []
    advice = [said(", ".join(recipes), " (not replayed)")] if recipes else []
    lines += trials.verdict(report, narrow, MARGIN)
    lines += _cure(report, narrow) + _labelled("to try", advice, narrow)
    return lines + _labelled("repro", [said(sentence(report))], narrow)


def _headline(report: Report, sheet: Sheet) -> list[Text]:
    """The verdict in one word and one sentence."""
    tag = _TAGS[report.verdict]
    word = f"{len(report.culprits)} CULPRITS" if _is_plural(report) else tag.word
    margin = len(word) + 2
    sentence = said((report.headline or tag.default, "bold"))
    lines = sheet.inside(margin).wrapped(sentence)
    return beside(said((word, f"bold {tag.style}")), lines, margin)


def _is_plural(report: Report) -> bool:
    return report.verdict == "culprit" and len(report.culprits) > 1


def _labelled(label: str, texts: Sequence[Text], sheet: Sheet) -> list[Text]:
    """Paragraphs beside a label; nothing where there are none."""
    inner = sheet.inside(MARGIN)
    return beside(said((label, "bold")), [w for t in texts for w in inner.wrapped(t)], MARGIN)


def _culprit(finding: Finding, mark: str, sheet: Sheet, *, late: str) -> list[Text]:
    """One culprit: where it is, what follows, what was measured, and the name of the cause."""
    pad = " " * len(mark)
    why = finding.explanation or ("" if finding.cause else "no known cause matches the evidence")
    inner = sheet.inside(MARGIN)
    measured = [line for words in finding.evidence for line in _bulleted(words, inner)]
    cause = f"{finding.cause} · nanhunt explain {finding.cause}" if finding.cause else ""
    return [
        *_labelled(f"{mark}where", _where(finding, late=late), sheet),
        *_labelled(f"{pad}why", [said(why)], sheet),
        *beside(said((f"{pad}measured", "bold")), measured, MARGIN),
        *_labelled(f"{pad}cause", [said(cause)] if cause else [], sheet),
    ]


def _bulleted(words: str, sheet: Sheet) -> list[Text]:
    """One measured fact behind a dot."""
    return beside(Text("·"), sheet.inside(2).wrapped(said(words)), 2)


def _where(finding: Finding, *, late: str) -> list[Text]:
    """The op and its formula, the line of code, then to whom it belongs and `late`: its step."""
    inside = " → ".join(filter(None, [finding.node, short(finding.formula_op or "")]))
    head = f"{short(finding.op)}, {_PLACES[finding.phase]}"
    owner = [
        f"module {finding.module}" if finding.module else "",
        f"loss term{'s' * (len(finding.terms) > 1)} {finding.term}" if finding.term else "",
        finding.dtype,
        f"occurrence {finding.occurrence}" if finding.occurrence > 1 else "",
        late,
    ]
    texts = [said((head, f"bold {BAD}"), f" · {inside}" if inside else ""), said(_spot(finding))]
    if finding.source:
        texts.append(said("  ", (finding.source.strip(), "italic")))
    return [*texts, said(" · ".join(filter(None, owner)))]


def _spot(finding: Finding) -> str:
    """The line of code, written so that terminals make a link of it."""
    if finding.file is None:
        return "line of code not known"
    line = "" if finding.line is None else f":{finding.line}"
    return f"{finding.file}{line}" + (f" in {finding.function}" if finding.function else "")


def _risky(report: Report) -> list[Run]:
    """The variants in which a natively finite step is non-finite."""
    if report.verdict != "at_risk":
        return []
    ran = (run for run in report.runs if run.raised is None and not run.ablated)
    return [run for run in ran if not run.is_finite]


def _risks(report: Report) -> list[Text]:
    """Each such variant in a sentence."""
    texts = []
    for run in _risky(report):
        words = f": loss {number(run.loss)}, {share(run.groups)} gradients non-finite"
        texts.append(said((run.variant, ODD), words))
    if texts and report.native is not None and report.native.is_finite:
        texts.append(said("native is finite"))
    return texts


def _unplaced(report: Report) -> list[Text]:
    """Where it happened, as far as the runs tell, when the report holds no finding."""
    native = [report.native] if report.native is not None else []
    for run in _risky(report) or native:
        if run.culprit:
            dtype = f" · {run.culprit_dtype}" if run.culprit_dtype else ""
            return [said((short(run.culprit) + dtype, BAD)), said(run.culprit_line or "")]
    return [said("cannot tell: no op was found that made it out of finite numbers")]


def _cure(report: Report, sheet: Sheet) -> list[Text]:
    """What was taken out and replayed: the cures first, then what does not cure."""
    tried = sorted((a for a in report.ablations if a.mode == "without"), key=lambda a: not a.cures)
    if not tried and report.trials:
        return []
    if not tried:
        return _labelled("cure", [said("not sought: no ablation was replayed")], sheet)
    inner = sheet.inside(MARGIN)
    names = [_names(a) for a in tried]
    lines = []
    if not tried[0].cures:
        lines += inner.wrapped(said("no cure found among ", ", ".join(names)))
    width = min(max(len("without "), *(cell_len(f"without {n}") for n in names[:SHOWN])) + 2, 40)
    for ablation, name in zip(tried[:SHOWN], names, strict=False):
        proof = "" if ablation.raised is not None else _PROOFS[ablation.took_effect]
        texts = inner.inside(width).wrapped(outcome(ablation) + said(proof))
        lines += beside(clipped(said(f"without {name}"), width - 2), texts, width)
    if len(tried) > SHOWN:
        lines.append(said(f"… {len(tried) - SHOWN} more below"))
    return beside(said(("cure", "bold")), lines, MARGIN)


def _names(ablation: Ablation) -> str:
    return clean(" + ".join(ablation.names))


# --- after the tables ----------------------------------------------------------------------------


def _path(report: Report, sheet: Sheet) -> list[Text]:
    """From each culprit to the first poisoned parameters, and how many are poisoned."""
    inner = sheet.inside(FOOT)
    many = len(report.culprits) > 1
    lines = []
    for i, finding in enumerate(report.culprits, start=1):
        rows = inner.flowed(_stations(finding.path), " → ")
        counts = [f"{group} {count}/{total}" for group, count, total in finding.poisoned]
        if counts:
            rows += inner.flowed([f"poisoned parameters: {counts[0]}", *counts[1:]], " · ")
        lines += beside(said((f"Path {i}" if many else "Path", "bold")), rows, FOOT)
    return lines


def _stations(path: Sequence[Step]) -> list[str]:
    """The way in a few words: neighbours that are called the same are one station."""
    names = [name for name, _ in groupby(map(_station, path))]
    if len(names) <= STATIONS:
        return names
    return [*names[:3], f"… {len(names) - 5} more …", *names[-2:]]


def _station(step: Step) -> str:
    """The module, else the line of code, else the op."""
    if step.module or step.frame is None:
        return step.module or short(step.op)
    return f"{PureWindowsPath(step.frame.file).name}:{step.frame.line}"


def _notes(report: Report, sheet: Sheet) -> list[Text]:
    """Further measured facts, and what was not looked at."""
    inner = sheet.inside(FOOT)
    facts = [*report.notes, *_harmless(report), *_REPEATED[report.deterministic]]
    notes = [line for words in facts for line in _bulleted(words, inner)]
    return [
        *beside(said(("Notes", "bold")), notes, FOOT),
        *beside(said(("Not checked", "bold")), inner.flowed(report.not_checked, " · "), FOOT),
    ]


def _harmless(report: Report) -> list[str]:
    """That there are non-finite values which reached nobody."""
    count = len(report.harmless)
    if not count:
        return []
    lines = "1 line of code made" if count == 1 else f"{count} lines of code made"
    return [f"{lines} non-finite values that reached neither loss nor gradient (--harmless)"]


# --- a healthy report ----------------------------------------------------------------------------


def _health(report: Report, sheet: Sheet) -> list[Text]:
    """Healthy, what was run, what was not."""
    inner = sheet.inside(FOOT)
    replays = [" − ".join([run.variant, *run.ablated]) for run in report.runs]
    replays += [f"{a.mode} {' + '.join(a.names)}" for a in report.ablations]
    if report.seconds:
        replays.append(f"{number(report.seconds)} s")
    precision = [] if _is_doubtful(report) else inner.wrapped(said(report.precision))
    return [
        *_headline(report, sheet),
        *beside(said(("Ran", "bold")), inner.flowed(replays, " · "), FOOT),
        *beside(said(("Precision", "bold")), precision, FOOT),
        *_notes(report, sheet),
    ]


def _is_doubtful(report: Report) -> bool:
    """Whether some replay of a healthy step was non-finite or raised."""
    return not all(run.is_finite for run in report.runs)


def _doubts(report: Report, sheet: Sheet) -> list[Text]:
    """The runs, where not all of them are finite."""
    return tables.runs(report, sheet) if _is_doubtful(report) else []


_Section = Callable[[Report, Sheet], list[Text]]
_HEALTHY: tuple[_Section, ...] = (_health, tables.pace, _doubts)
_SECTIONS: tuple[_Section, ...] = (
    _verdict,
    tables.pace,
    tables.runs,
    tables.ablations,
    trials.table,
    tables.diagnosis,
    around_culprit,
    _path,
    _notes,
)
