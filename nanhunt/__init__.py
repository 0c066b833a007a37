"""nanhunt: which operation first made a non-finite value, on which line, why, and what cures it."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanhunt.errors import NanhuntError, NonFiniteError
    from nanhunt.guarding import detect
    from nanhunt.hunting import hunt
    from nanhunt.objective import guard_objective
    from nanhunt.records import Finding, Report
    from nanhunt.store import load
    from nanhunt.subject import Subject
    from nanhunt.variants import Variant

__all__ = ["Finding", "NanhuntError", "NonFiniteError", "Report", "Subject", "Variant", "detect",
           "guard_objective", "hunt", "load"]  # fmt: skip

_HOMES = {
    "Finding": "nanhunt.records", "NanhuntError": "nanhunt.errors",
    "NonFiniteError": "nanhunt.errors", "Report": "nanhunt.records", "Subject": "nanhunt.subject",
    "Variant": "nanhunt.variants", "detect": "nanhunt.guarding",
    "guard_objective": "nanhunt.objective", "hunt": "nanhunt.hunting", "load": "nanhunt.store",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__


if "IPython" in sys.modules:  # a report shows itself in a notebook
    import_module("nanhunt.adapters.notebook").register()
