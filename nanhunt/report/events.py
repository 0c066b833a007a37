"""Every recorded op as one row of a pandas frame."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanhunt.errors import UsageError
from nanhunt.places import readable_path
from nanhunt.records import OpEvent, TensorFacts, Trace

if TYPE_CHECKING:
    import pandas as pd

FORMATS = (".csv", ".parquet")


def check_format(path: Path) -> None:
    """Refuse a file whose ending is not one of `FORMATS`, or whose writer is not installed."""
    if path.suffix not in FORMATS:
        raise UsageError(f"--events {path}: the name is to end in .csv or .parquet")
    if path.suffix == ".parquet":
        from importlib.util import find_spec

        if find_spec("pyarrow") is None:
            raise UsageError(
                f"--events {path}: writing Parquet needs pyarrow; use .csv, or "
                "pip install 'nanhunt[parquet]'"
            )


def tabulate(trace: Trace) -> "pd.DataFrame":
    """One row per event, in the order of time.

    Columns: index, phase, op, node, number, module, file, line, function, terms, birth, asked,
    shapes and dtypes of inputs and outputs as text, and the counts of NaN, +inf and -inf of each.
    """
    import pandas as pd

    frame = pd.DataFrame([_row(event, trace) for event in trace.events])
    return frame.convert_dtypes()  # whole numbers stay whole where some are missing


def save(trace: Trace, path: Path) -> None:
    """Write the frame, as its name says.

    Raises:
        UsageError: the file cannot be written.
    """
    check_format(path)
    frame = tabulate(trace)
    try:
        if path.suffix == ".csv":
            frame.to_csv(path, index=False)
        else:
            frame.to_parquet(path, index=False)
    except OSError as error:
        raise UsageError(f"--events {path} cannot be written: {error.strerror or error}") from error


def _row(event: OpEvent, trace: Trace) -> dict[str, Any]:
    number = event.made if event.number is None else event.number
    frame = event.frame
    return {
        "index": event.index,
        "phase": event.phase,
        "op": event.op,
        "node": event.node,
        "number": number,
        "module": event.module,
        "file": readable_path(frame.file) if frame else None,
        "line": frame.line if frame else None,
        "function": frame.function if frame else None,
        "terms": " ".join(trace.owners.get(number, ())) if number is not None else "",
        "birth": event.birth.count if event.birth else 0,
        "asked": event.asked,
        "inputs": " ".join(map(_told, event.inputs)),
        "outputs": " ".join(map(_told, event.outputs)),
        **dict(_counts("in", event.inputs)),
        **dict(_counts("out", event.outputs)),
    }


def _told(facts: TensorFacts) -> str:
    return f"{facts.dtype}[{'x'.join(map(str, facts.shape))}]"


def _counts(side: str, tensors: tuple[TensorFacts, ...]) -> Iterator[tuple[str, int]]:
    yield f"{side}_nan", sum(facts.nan for facts in tensors)
    yield f"{side}_posinf", sum(facts.posinf for facts in tensors)
    yield f"{side}_neginf", sum(facts.neginf for facts in tensors)
