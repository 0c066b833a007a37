"""The figures of a run, told: a pandas frame, a CSV file, scalars for TensorBoard, a page.

`columns` lays a step out as a row and reads it back, `journal` writes such rows to a file,
`reading` reads them, `tabular` makes a frame of them, `scalars` hands them on; `page` shows the
findings, with `sparks` for the course of a number.
"""

from nanhunt.report.health.journal import Journal
from nanhunt.report.health.page import render
from nanhunt.report.health.reading import Record, read
from nanhunt.report.health.scalars import Scalars, numbers, open_log
from nanhunt.report.health.tabular import frame

__all__ = ["Journal", "Record", "Scalars", "frame", "numbers", "open_log", "read", "render"]
