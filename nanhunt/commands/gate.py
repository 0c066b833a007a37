"""`nanhunt gate`: replays what a configuration asks for, and lets nothing unhealthy through."""

import contextlib
import datetime as dt
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nanhunt.commands.outputs import check_files
from nanhunt.commands.screen import progress, wide_console
from nanhunt.errors import StoreError

if TYPE_CHECKING:
    from nanhunt.gate import Baseline, Policy
    from nanhunt.records import Outcome


def gate(
    *,
    config: Annotated[
        Path | None,
        typer.Option(help="A TOML file; else [tool.nanhunt] of the nearest pyproject.toml."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything there as JSON.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML there.")] = None,
    sarif: Annotated[Path | None, typer.Option(help="Write SARIF 2.1.0 there.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write Markdown there.")] = None,
    update_baseline: Annotated[
        bool, typer.Option("--update-baseline", help="Write the gradient norms of this run.")
    ] = False,
) -> None:
    """Check the gradients of your code: exit 0 passed, 1 findings, 2 not run, 3 not reproducible.

    In GitHub Actions, findings become annotations and the job's summary by themselves.
    """
    wanted = {"json": json, "junit": junit, "sarif": sarif, "markdown": markdown}
    files = {form: path.absolute() for form, path in wanted.items() if path is not None}
    check_files(**files)
    from nanhunt.gate import find_policy

    policy = find_policy(config)
    if update_baseline and policy.baseline is None:
        raise StoreError(
            f"--update-baseline: {policy.file.name} names no file for it; "
            f'add baseline = "nanhunt-baseline.json"'
        )
    # Everything is named from the folder of the configuration, wherever the command runs.
    with contextlib.chdir(policy.root):
        outcome = _run(policy, update=update_baseline)
    for form, path in files.items():
        _write(form, outcome, path)
    _tell_actions(outcome)
    from nanhunt.report.gated import table

    wide_console().print(table.render(outcome))
    raise typer.Exit(outcome.exit_code)


def _run(policy: "Policy", *, update: bool) -> "Outcome":
    """Measure and judge; the baseline is read before and written after the work."""
    from nanhunt.gate import Baseline, judge

    before = _read_baseline(policy)
    start = time.perf_counter()
    with progress() as tell:
        tell("torch")
        from nanhunt.gating import measure

        reports, broken = measure(policy, tell)
    baseline = before
    if update:
        named = [(rule.case(report.batch, report.seed), report) for rule, report in reports]
        baseline = (before or Baseline({})).updated(Baseline.of(named))
        _write_baseline(policy, baseline)
    today = dt.datetime.now().astimezone().date()
    outcome = judge(reports, policy, baseline=baseline, today=today, broken=broken)
    return replace(outcome, seconds=time.perf_counter() - start)


def _read_baseline(policy: "Policy") -> "Baseline | None":
    from nanhunt.gate import Baseline

    if policy.baseline is None or not Path(policy.baseline).exists():
        return None
    try:
        text = Path(policy.baseline).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise StoreError(f"the baseline {policy.baseline} cannot be read: {why}") from None
    return Baseline.parse(text, policy.baseline)


def _write_baseline(policy: "Policy", baseline: "Baseline") -> None:
    from nanhunt import store

    if policy.baseline is not None:
        store.write(baseline.dump(), policy.baseline)


def _write(form: str, outcome: "Outcome", path: Path) -> None:
    from nanhunt import store

    if form == "json":
        store.write(store.dump(outcome), path)
        return
    from importlib import import_module

    store.write(import_module(f"nanhunt.report.gated.{form}").render(outcome), path)


def _tell_actions(outcome: "Outcome") -> None:
    """Annotations and the job's summary, where GitHub Actions runs this."""
    if os.environ.get("GITHUB_ACTIONS") == "true":
        from nanhunt.report.gated import actions

        typer.echo(actions.render(outcome), nl=False)
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        from nanhunt.report.gated import markdown

        with contextlib.suppress(OSError), Path(summary).open("a", encoding="utf-8") as file:
            file.write(markdown.render(outcome))
