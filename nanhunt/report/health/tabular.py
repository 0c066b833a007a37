"""The figures of a run as a pandas frame, which shows itself in a notebook."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nanhunt.records import Figures
from nanhunt.report.health.columns import cells_of

if TYPE_CHECKING:
    import pandas as pd

_FLAGS = ("stepped", "scheduled")


def frame(figures: Sequence[Figures]) -> "pd.DataFrame":
    """One row per step, indexed by it, with the columns of the file; empty columns are left out.

    What is not finite is missing, and counted in the columns named `nonfinite`.
    """
    import pandas as pd

    table = pd.DataFrame([cells_of(f) for f in figures]).convert_dtypes()
    if table.empty:
        return table
    for name in _FLAGS:
        table[name] = table[name].astype("boolean")
    return table.dropna(axis="columns", how="all").set_index("step")
