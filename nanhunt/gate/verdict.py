"""From reports and a policy to the outcome of a gate; the day is an argument."""

import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import replace

from nanhunt.gate.baseline import AGAIN, Baseline
from nanhunt.gate.case import Case, make_checked
from nanhunt.gate.checks import RUN
from nanhunt.gate.policy import Allowance, Gated, Policy
from nanhunt.records import Checked, Outcome, Report


def judge(
    reports: Sequence[tuple[Gated, Report]],
    policy: Policy,
    *,
    baseline: Baseline | None,
    today: dt.date,
    broken: Sequence[tuple[str, str]] = (),
) -> Outcome:
    """Make every check of every report, and apply what is allowed.

    Args:
        reports: each with the subject that it is of.
        policy: what was asked for.
        baseline: gradient norms of an earlier state, if there are any.
        today: the day on which an allowance is in force or has expired.
        broken: cases that could not be run, each with why.
    """
    checked: list[Checked] = []
    used: set[int] = set()
    for rule, report in reports:
        case = _case(rule, report, policy, baseline)
        for check, run in RUN.items():
            for found in run(case):
                one = _required(make_checked(check, case, found), policy)
                checked.append(_allowed(one, policy.allowances, today, used))
    checked.extend(_expired(policy.allowances, today))
    return Outcome(
        checked=tuple(checked),
        config=policy.file.name,
        broken=tuple(broken),
        notes=tuple(_unused(policy.allowances, used, today)),
        reports=tuple(report for _, report in reports),
    )


def _case(rule: Gated, report: Report, policy: Policy, baseline: Baseline | None) -> Case:
    name = rule.case(report.batch, report.seed)
    if policy.baseline is None:
        return Case(name, report, rule, missing="[tool.nanhunt] names no baseline file")
    if baseline is None:
        missing = f"there is no file {policy.baseline} yet; {AGAIN}"
        return Case(name, report, rule, missing=missing)
    norms = baseline.norms.get(name)
    return Case(name, report, rule, norms, f"{policy.baseline} has no such case; {AGAIN}")


def _required(one: Checked, policy: Policy) -> Checked:
    """What may not be left out and was, is a finding."""
    if one.status != "not run" or one.check not in policy.required:
        return one
    return replace(one, status="finding", message=f"is required and was not run: {one.message}")


def _allowed(
    one: Checked, allowances: Sequence[Allowance], today: dt.date, used: set[int]
) -> Checked:
    """A finding that is let through, with the reason."""
    for index, allowance in enumerate(allowances):
        if one.status != "finding" or not allowance.covers(one):
            continue
        used.add(index)
        if allowance.until >= today:
            reason = f"{allowance.reason} (until {allowance.until.isoformat()})"
            return replace(one, status="allowed", reason=reason)
    return one


def _expired(allowances: Sequence[Allowance], today: dt.date) -> Iterator[Checked]:
    """A finding for each allowance whose day is over."""
    if not allowances:
        yield Checked("NH012", "", "passed", "nothing is allowed")
        return
    over = [allowance for allowance in allowances if allowance.until < today]
    for one in over:
        told = f"the allowance of {one.check} {_meant(one)} expired on {one.until.isoformat()}"
        message = f"{told}; its reason was: {one.reason}"
        yield Checked("NH012", "", "finding", message, name=one.check, config_line=one.line)
    if not over:
        last = min(allowance.until for allowance in allowances)
        told = f"{len(allowances)} in force, the first until {last.isoformat()}"
        yield Checked("NH012", "", "passed", told)


def _unused(allowances: Sequence[Allowance], used: set[int], today: dt.date) -> Iterator[str]:
    for index, one in enumerate(allowances):
        if index not in used and one.until >= today:
            yield f"the allowance of {one.check} {_meant(one)} allows nothing: remove it"


def _meant(one: Allowance) -> str:
    return f"for {one.name}" if one.name != "*" else "for everything"
