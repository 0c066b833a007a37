"""What was changed and replayed: the fix and its proof beside the verdict, all in a table."""

import math
from collections.abc import Iterator

from rich.cells import cell_len
from rich.text import Text

from nanhunt.records import ENDLESS, Report, Trial
from nanhunt.report.layout import Column, Grid, Sheet, beside, clean, clipped, number, said
from nanhunt.report.tables import BAD, GOOD, ODD

SHOWN = 4  # refuted changes that are named beside the fix; the table has them all


def best(report: Report) -> Trial | None:
    """The first change that is proven, else the first that makes the step finite."""
    tried = fixes(report)
    finite = [trial for trial in tried if trial.finite]
    return next((trial for trial in tried if trial.is_proven), finite[0] if finite else None)


def fixes(report: Report) -> list[Trial]:
    """The trials that change the program, and not what an op returned."""
    return [trial for trial in report.trials if not trial.is_neutralising]


def untried(report: Report) -> list[str]:
    """What the causes advise and no trial has shown anything about."""
    tried = {name for trial in fixes(report) for name in trial.recipe.split(" + ")}
    advised = dict.fromkeys(recipe for finding in report.culprits for recipe in finding.recipes)
    return [recipe for recipe in advised if recipe not in tried]


def proof(trial: Trial) -> str:
    """What a replay with the change showed, in words."""
    if not trial.finite:
        return "raised" if trial.raised else "still non-finite"
    parts = ["finite", *_compared(trial)]
    if trial.is_silent:
        parts.append("every gradient that failed is exactly 0: nothing is learnt there")
    elif trial.vanished:
        noun = "parameter gets" if trial.vanished == 1 else "parameters get"
        parts.append(f"{trial.vanished} {noun} a gradient of exactly 0")
    if trial.is_unverified:
        is_endless = abs(trial.loss) > ENDLESS
        told = f"a loss of {number(trial.loss)} is finite in name only"
        parts.append(told if is_endless else "what it drops cannot be compared")
    return ", ".join(parts)


def _compared(trial: Trial) -> Iterator[str]:
    if trial.loss_change is not None:
        yield f"loss {'as before' if trial.loss_change == 0 else change(trial)}"
    if trial.gradient_error is not None:
        agrees = trial.gradient_error <= trial.gradient_tolerance
        verb = "agrees with" if agrees else "differs from"
        yield f"gradient {verb} {trial.reference}: {number(trial.gradient_error)}"
    else:
        yield "no finite gradient to compare with"
    if not trial.is_compared and trial.result_change is not None:
        same = trial.result_change <= trial.loss_tolerance
        amount = f"changed by {number(100 * trial.result_change)} %"
        yield f"finite results {'as before' if same else amount}"


def change(trial: Trial) -> str:
    """By how much the loss changed, or to what: of one that was 0 there are no percents."""
    amount = trial.loss_change or 0.0
    return (
        f"changed by {number(100 * amount)} %" if amount < 1 else f"changed to {number(trial.loss)}"
    )


def sole_cause(report: Report) -> list[str]:
    """Whether the step is finite when the culprit's result is repaired at birth."""
    told = {
        True: "yes: repaired at birth the step is finite (replayed)",
        False: "no: repaired at birth the step is still non-finite (replayed)",
    }
    return [told[trial.finite] for trial in report.trials if trial.is_neutralising]


def fix(report: Report) -> Text:
    """The first fix and its proof, or that there is none among those that were tried."""
    tried, found = fixes(report), best(report)
    if found is None:
        kinds = dict.fromkeys(trial.recipe for trial in tried)
        names = ", ".join(kinds)
        return said(f"none of {len(tried)} changes made it finite: ", names) if tried else said()
    word = ("proven", GOOD) if found.is_proven else ("not proven", ODD)
    return said((found.recipe, "bold"), "  ", word, f": {proof(found)}")


def refuted(report: Report) -> Text:
    """What was replayed beside a fix that works, and does not help."""
    failed = [t.recipe for t in fixes(report) if not t.finite and t.raised is None]
    if not failed or best(report) is None:
        return said()
    names = ", ".join([*dict.fromkeys(failed)][:SHOWN])
    return said(("refuted", ODD), f": {names}: still non-finite (replayed)")


def in_words(trial: Trial) -> str:
    """The change and its places, where it cannot be written in the line itself."""
    return trial.change + (f" at {', '.join(dict.fromkeys(trial.sites))}" if trial.sites else "")


def verdict(report: Report, sheet: Sheet, margin: int) -> list[Text]:
    """The fix, its proof and the line as it would read; then what was shown not to help."""
    inner = sheet.inside(margin)
    lines: list[Text] = []
    for told in sole_cause(report):
        lines += beside(said(("sole cause", "bold")), inner.wrapped(said(told)), margin)
    found = best(report)
    texts = inner.wrapped(fix(report))
    texts += _written(found, inner) if found is not None else ()
    texts += inner.wrapped(refuted(report))
    return lines + beside(said(("fix", "bold")), texts, margin)


def _written(trial: Trial, sheet: Sheet) -> Iterator[Text]:
    """The line before and after, where the change can be written there; else in words."""
    if trial.before is None or trial.after is None:
        yield from sheet.wrapped(said(in_words(trial)))
        return
    for mark, line, style in (("-", trial.before, BAD), ("+", trial.after, GOOD)):
        yield from beside(said((mark, style)), sheet.inside(2).wrapped(said(line)), 2)


def table(report: Report, width: int) -> Grid:
    """Every trial: what was changed, and what the replay showed."""
    tried = fixes(report)
    if not tried:
        return Grid()
    names = [said(trial.recipe) for trial in tried]
    shown = [said((proof(t), _style(t))) for t in tried]
    what = [said(clean(trial.change)) for trial in tried]
    room = max(width - max(cell_len(n.plain) for n in names) - 44, 12)
    return Grid(
        [
            Column("Trials", names),
            Column("change", [clipped(text, room) for text in what], rank=1),
            Column("outcome", shown),
        ]
    )


def _style(trial: Trial) -> str:
    if trial.is_proven:
        return GOOD
    return ODD if trial.finite or math.isfinite(trial.loss) else ""
