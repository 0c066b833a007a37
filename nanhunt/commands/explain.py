"""`nanhunt explain`: what a cause, a check, a symptom or an op is known for."""

from typing import Annotated

import typer

from nanhunt.errors import UsageError


def explain(
    name: Annotated[
        str, typer.Argument(help="A cause, a symptom, a check as NH002, or an op as log.")
    ],
) -> None:
    """Say what a cause, a symptom or a check means, or what an op is known for."""
    import difflib

    from nanhunt.causes import CAUSES, causes_of
    from nanhunt.gate.table import BY_ID
    from nanhunt.health import BY_SLUG

    if name.upper() in BY_ID:
        check = BY_ID[name.upper()]
        typer.echo(f"{check.id} {check.slug}: {check.title}\n{check.help}")
        return
    if name in BY_SLUG:
        from nanhunt.report.health.wording import tell

        typer.echo(tell(BY_SLUG[name]))
        return

    rows = {row.slug: row for row in CAUSES}
    found = (rows[name],) if name in rows else causes_of(name)
    if not found:
        near = difflib.get_close_matches(name, [*rows, *BY_SLUG], 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(
            f"no cause is called {name!r}, and no op of that name is known for one; {hint}"
            f"known: {', '.join(rows)}"
        )
    for row in found:
        typer.echo(f"{row.slug}: {row.title}")
        typer.echo(row.about)
        if row.recipes:
            typer.echo(f"worth trying: {', '.join(row.recipes)}")
        if row is not found[-1]:
            typer.echo()
