"""`nanhunt init`: a commented configuration and a workflow to start from."""

import tomllib
from pathlib import Path
from typing import Annotated

import typer

from nanhunt.errors import UsageError

WORKFLOW = Path(".github/workflows/nanhunt.yml")
_EXAMPLE = "examples/subject.py:build"  # what stands there until a subject is named


def init(
    *,
    subject: Annotated[
        str, typer.Option(help="What is to be gated: path/to/file.py:factory or module:factory.")
    ] = _EXAMPLE,
    workflow: Annotated[
        bool, typer.Option("--workflow/--no-workflow", help="Write a GitHub workflow too.")
    ] = True,
) -> None:
    """Write [tool.nanhunt] into pyproject.toml and a GitHub workflow; nothing is overwritten."""
    from nanhunt import store
    from nanhunt.gate.template import CONFIGURATION, JOB

    file = Path("pyproject.toml")
    before = _read(file)
    added = CONFIGURATION.replace("SUBJECT", _quoted(subject))
    joint = "\n" if before and not before.endswith("\n\n") else ""
    if workflow and WORKFLOW.exists():
        raise UsageError(f"{WORKFLOW} exists already; --no-workflow leaves it as it is")
    if workflow:
        try:
            WORKFLOW.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{WORKFLOW.parent} cannot be made: {error.strerror}") from None
        store.write(JOB, WORKFLOW)
    store.write(f"{before}{joint}{added}", file)
    ask = "name your subject there, then " if subject == _EXAMPLE else "now "
    typer.echo(f"{file}: [tool.nanhunt] added; {ask}run nanhunt gate")
    if workflow:
        typer.echo(f"{WORKFLOW}: written")


def _read(file: Path) -> str:
    """The text of the file as it is, which must not hold a configuration yet."""
    if not file.exists():
        return ""
    try:
        text = file.read_text(encoding="utf-8")
        tool = tomllib.loads(text).get("tool", {})
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as TOML: {error}; mend it first") from None
    if isinstance(tool, dict) and "nanhunt" in tool:
        raise UsageError(f"{file} has [tool.nanhunt] already; edit it there")
    return text


def _quoted(text: str) -> str:
    """A TOML string."""
    import json

    return json.dumps(text)
