"""From places on this machine to places that a reader knows."""

import linecache
import sys
from dataclasses import replace
from pathlib import Path

from nanhunt.records import Finding, Frame


def readable_path(file: str) -> str:
    """A path relative to where the command runs, else to where Python imports from."""
    path = Path(file)
    for root in (Path.cwd(), *map(Path, sorted(filter(None, sys.path), key=len, reverse=True))):
        try:
            return str(path.relative_to(root))
        except ValueError:
            continue
    package = path.parent
    while (package / "__init__.py").is_file():
        package = package.parent
    return str(path.relative_to(package)) if package != path.parent else file


def readable_frame(frame: Frame) -> Frame:
    """The same line with a readable path."""
    return replace(frame, file=readable_path(frame.file))


def told_finding(finding: Finding) -> Finding:
    """The same finding with its source line and with readable paths."""
    source = linecache.getline(finding.file or "", finding.line or 0).strip()
    return replace(
        finding,
        source=source or None,
        file=readable_path(finding.file) if finding.file else None,
        path=tuple(
            replace(step, frame=readable_frame(step.frame)) if step.frame else step
            for step in finding.path
        ),
    )


def code_of(finding: Finding) -> list[str]:
    """The lines of the Python file of a finding, where it is at hand and still reads so.

    Empty where the line is no longer what the report says, or was never known: a report may come
    from elsewhere, and nothing but the code that it speaks of is to be read for it.
    """
    if not finding.file or not finding.line or not finding.source:
        return []
    lines = linecache.getlines(finding.file) if finding.file.endswith(".py") else []
    if not 0 < finding.line <= len(lines):
        return []
    is_same = lines[finding.line - 1].strip() == finding.source.strip()
    return lines if is_same else []
