"""One report of several processes that took a step together: who of them made the value."""

from collections.abc import Mapping
from dataclasses import replace

from nanhunt.causes import base_name
from nanhunt.records import Finding, Rank, RankState, Report

RECEIVED = "received_from_another_rank"


def merge_ranks(
    reports: Mapping[int, Report], size: int, others: Mapping[int, RankState] | None = None
) -> Report:
    """The report of the lowest rank whose own trace holds the birth, with a row for every rank.

    Args:
        reports: of the ranks that answered, at least one; each is of its own part of the step.
        size: the number of processes.
        others: what is known of ranks without a report; of those not in it nothing is.
    """
    rows = tuple(
        Rank(rank, (others or {}).get(rank, "missing"))
        if rank not in reports
        else _row(rank, reports[rank])
        for rank in range(size)
    )
    told = min(reports, key=lambda rank: (_ORDER.index(rows[rank].state), rank))
    report = reports[told]
    if rows[told].state == "culprit":
        report = replace(report, headline=f"{report.headline} (rank {told} of {size})")
    return replace(report, rank=told, ranks=rows)


_ORDER: tuple[RankState, ...] = ("culprit", "unexplained", "received", "finite", "missing")


def _row(rank: int, report: Report) -> Rank:
    own = [finding for finding in report.culprits if finding.cause != RECEIVED]
    if own:
        return Rank(rank, "culprit", _place(own[0]))
    if report.culprits:
        return Rank(rank, "received", _place(report.culprits[0]))
    native = report.native
    return Rank(rank, "finite" if native is not None and native.is_finite else "unexplained")


def _place(finding: Finding) -> str:
    line = f" at {finding.file}:{finding.line}" if finding.file else ""
    return f"{base_name(finding.op)}{line}"
