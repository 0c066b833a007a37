"""The forms in which a report can be told: a name, and the function that renders it."""

from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

from nanhunt.errors import UsageError
from nanhunt.records import Report

if TYPE_CHECKING:
    from rich.console import RenderableType

FORMS: Mapping[str, str] = MappingProxyType(
    {
        "harmless": "nanhunt.report.harmless",
        "modules": "nanhunt.report.modules",
        "short": "nanhunt.report.short",
        "terminal": "nanhunt.report.terminal",
    }
)
FILES: Mapping[str, str] = MappingProxyType(
    {"html": "nanhunt.report.html", "markdown": "nanhunt.report.markdown"}
)


def renderer(name: str) -> "Callable[[Report], RenderableType]":
    """The `render` function of the form `name`; only its own module is imported."""
    if name not in FORMS:
        raise UsageError(f"{name!r} is no form of a report; known: {', '.join(sorted(FORMS))}")
    render: Callable[[Report], RenderableType] = import_module(FORMS[name]).render
    return render


def writer(name: str) -> Callable[[Report], str]:
    """The `render` function of the form `name` for a file; only its own module is imported."""
    render: Callable[[Report], str] = import_module(FILES[name]).render
    return render
