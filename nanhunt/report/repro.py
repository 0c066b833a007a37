"""What came of the script that shows a culprit with torch alone, in one sentence."""

from nanhunt.records import Report, Reproduction


def sentence(report: Report) -> str:
    """Where the script is and whether it reproduces; empty where none was asked for."""
    repro = report.repro
    if repro is None:
        return ""
    if not repro.folder:
        return f"none: {repro.note}"
    script = f"{repro.folder}/repro.py"
    if not repro.works:
        return f"{script} does not reproduce: {repro.note}"
    more = f"; {repro.note}" if repro.note else ""
    return f"{script} reproduces with torch alone ({_size(repro, report.samples)}){more}"


def _size(repro: Reproduction, samples: int | None) -> str:
    """How large it is, and what of the operands it holds."""
    size = f"{repro.bytes} B" if repro.bytes < 1000 else f"{repro.bytes / 1000:.3g} kB"
    if repro.bytes >= 1_000_000:
        size = f"{repro.bytes / 1_000_000:.3g} MB"
    cut = [(name, before, after) for name, before, after in repro.operands if before != after]
    if not cut:
        return f"{size}, all of the operands"
    if any((before[0], after[0]) == (samples, 1) for _, before, after in cut):
        return f"{size}, 1 of {samples} samples"
    name, before, after = cut[0]
    return f"{size}, {name} {list(after)} of {list(before)}"
