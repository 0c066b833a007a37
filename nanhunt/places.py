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
