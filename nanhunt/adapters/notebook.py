"""A report that shows itself in a notebook, told to IPython instead of to the record.

Records never render, so `Report` has no `_repr_html_`: IPython is told by the name of the class how
one is shown, and nothing is imported before one is.
"""

import sys
from typing import Any

from nanhunt.records import Report


def register() -> None:
    """Tell the running IPython shell how reports are shown: as a page, and in a few lines."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is None:
        return
    formatters = shell.display_formatter.formatters
    home = (Report.__module__, Report.__qualname__)
    formatters["text/html"].for_type_by_name(*home, _page)
    formatters["text/plain"].for_type_by_name(*home, _lines)


def _page(report: Report) -> str:
    from nanhunt.report.html import embed

    return embed(report)


def _lines(report: Report, printer: Any, cycle: bool) -> None:  # noqa: FBT001 - called by IPython
    from nanhunt.report.short import tell

    printer.text("Report(...)" if cycle else tell(report))
