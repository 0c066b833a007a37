"""nanhunt: which operation first made a non-finite value, on which line, why, and what cures it."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanhunt.errors import NanhuntError, NonFiniteError
    from nanhunt.guarding import detect
    from nanhunt.hunting import hunt
    from nanhunt.records import Finding, Report
    from nanhunt.store import load
    from nanhunt.subject import Subject
    from nanhunt.variants import Variant
    from nanhunt.watching import watch

__all__ = ["Finding", "NanhuntError", "NonFiniteError", "Report", "Subject", "Variant", "detect",
           "hunt", "load", "watch"]  # fmt: skip

_HOMES = {
    "Finding": "nanhunt.records", "NanhuntError": "nanhunt.errors",
    "NonFiniteError": "nanhunt.errors", "Report": "nanhunt.records", "Subject": "nanhunt.subject",
    "Variant": "nanhunt.variants", "detect": "nanhunt.guarding", "hunt": "nanhunt.hunting",
    "load": "nanhunt.store", "watch": "nanhunt.watching",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


if "IPython" in sys.modules:  # a report shows itself in a notebook
    import_module("nanhunt.adapters.notebook").register()
