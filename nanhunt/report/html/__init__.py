"""A report as one HTML page that needs nothing else: no network, no script, no second file.

`render` makes the page, `embed` a frame that shows it inside another page, such as a notebook.
"""

from nanhunt.report.html.page import embed, render

__all__ = ["embed", "render"]
