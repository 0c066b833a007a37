"""The command line: one short function per command, heavy imports inside them.

Exit codes: 0 the command ran; 1 and 3 only with `--exit-code` (a culprit; two native replays that
disagree, or one that differs from the original in its capsule) and from `nanhunt repro` (a script
that does not reproduce; a culprit that did not come again); 2 it could not run; 130 interrupted.
`nanhunt run` ends as its program does, or with 1 at a culprit.
"""

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from nanhunt.commands import add_to
from nanhunt.commands.capsules import Wanted
from nanhunt.commands.outputs import Html, Markdown, check_files, write_pages
from nanhunt.commands.screen import progress, wide_console
from nanhunt.errors import NanhuntError, UsageError
from nanhunt.records import Finding, Report, Trace

app = typer.Typer(
    name="nanhunt",
    help="Finds the operation that first makes a loss or a gradient non-finite, and why.",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

CULPRIT, REFUSED, NOT_REPRODUCIBLE, INTERRUPTED = 1, 2, 3, 130


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context,
    *,
    show: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Finds the operation that first makes a loss or a gradient non-finite, and why."""
    if show:
        from importlib import metadata

        typer.echo(f"nanhunt {metadata.version('nanhunt')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(REFUSED)


_Subject = Annotated[
    str | None,
    typer.Argument(
        help="An installed subject (see `nanhunt subjects`), path/to/file.py:factory, "
        "package.module:factory, or FILE.capsule. Without it: [tool.nanhunt] subject of "
        "pyproject.toml, "
        "else the bundled incident."
    ),
]
_Factory = Annotated[
    str | None, typer.Option("--subject", help="The factory of a capsule's subject, to import.")
]
_Trust = Annotated[
    bool, typer.Option("--trust", help="Import the factory that the capsule itself names.")
]
_Batch = Annotated[int | None, typer.Option(help="Index of the batch.", show_default="0")]
_Steps = Annotated[
    int | None,
    typer.Option(
        help="Take so many real optimizer steps, and hunt in the one that fails.", show_default="1"
    ),
]
_Ablate = Annotated[
    list[str] | None,
    typer.Option(help="Weight or loss term to take out; repeat or separate by commas; `all`."),
]
_Precision = Annotated[
    list[str] | None,
    typer.Option(
        help="Variants besides native: fp64, fp32, amp-fp16, amp-bf16, amp-fp16-net, "
        "amp-bf16-net; repeat or separate by commas."
    ),
]
_Set = Annotated[
    list[str] | None, typer.Option("--set", help="key=value for the subject's factory.")
]
_Events = Annotated[
    Path | None, typer.Option(help="Write every native op there, as .csv or .parquet.")
]
_Modules = Annotated[bool, typer.Option("--modules", help="Print what every module did.")]
_Harmless = Annotated[
    bool, typer.Option("--harmless", help="List the non-finite values that reached nobody.")
]
_Repro = Annotated[
    Path | None,
    typer.Option(help="Write a script there that shows the culprit with torch alone, and run it."),
]
_Quick = Annotated[bool, typer.Option("--quick", help="Leave the trials of fixes out.")]
_Samples = Annotated[
    bool, typer.Option("--samples", help="Find the samples of the batch that fail alone.")
]
_ExitCode = Annotated[
    bool, typer.Option("--exit-code", help="1 on a culprit, 3 when it does not come again.")
]


@app.command()
def replay(  # noqa: PLR0913 - one parameter per option of the command
    subject: _Subject = None,
    *,
    factory: _Factory = None,
    trust: _Trust = False,
    batch: _Batch = None,
    steps: _Steps = None,
    ablate: _Ablate = None,
    precision: _Precision = None,
    option: _Set = None,
    seed: Annotated[int, typer.Option(help="Under which the subject is built.")] = 0,
    seeds: Annotated[int, typer.Option(help="Replay so many other initialisations.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json: Annotated[Path | None, typer.Option(help="Write the report there as well.")] = None,
    html: Html = None,
    markdown: Markdown = None,
    events: _Events = None,
    modules: _Modules = False,
    harmless: _Harmless = False,
    samples: _Samples = False,
    quick: _Quick = False,
    repro: _Repro = None,
    exit_code: _ExitCode = False,
) -> None:
    """Replay one training step in several variants and name the first non-finite value."""
    check_files(json=json, events=events, html=html, markdown=markdown)
    _check_steps(seeds, steps or 1)
    wanted = Wanted(subject, factory, trust, seed=seed, device=device)
    wanted.check(batch, steps)
    with progress() as tell:
        tell("torch")
        from nanhunt.hunting import Order, Plan, investigate
        from nanhunt.variants import DEFAULT

        order = Order(repro) if repro is not None else None
        wanted = replace(wanted, options=_options(option))
        with wanted.opened(tell) as opened:
            if opened.remark:
                typer.echo(opened.remark)
            others = (wanted.load(opened.spec, further=k).subject for k in range(1, seeds + 1))
            plan = Plan(
                batch or 0,
                _names(precision) or DEFAULT,
                _names(ablate),
                others,
                tell,
                events is not None,
                1 if steps is None else steps,
                samples=samples,
                repro=order,
            )
            plan = replace(plan, budget=0.0 if quick else plan.budget)
            report, trace = investigate(opened.subject, plan)
    report = replace(opened.told(report), command=shlex.join(["nanhunt", *sys.argv[1:]]))
    _save(report, trace, json=json, events=events)
    _tell_missing(report, repro)
    _print(report, "terminal", *_chosen(modules=modules, harmless=harmless))
    write_pages(report, html=html, markdown=markdown)
    _leave(report, exit_code=exit_code)


@app.command()
def show(
    report: Annotated[Path, typer.Argument(help="A report saved with --json.")],
    *,
    html: Html = None,
    markdown: Markdown = None,
    modules: _Modules = False,
    harmless: _Harmless = False,
) -> None:
    """Print a saved report again, or write it in another form; torch is not needed."""
    from nanhunt import store

    check_files(html=html, markdown=markdown)
    loaded = store.load(report)
    _print(loaded, "terminal", *_chosen(modules=modules, harmless=harmless))
    write_pages(loaded, html=html, markdown=markdown)


@app.command("repro")
def write_repro(
    report: Annotated[Path, typer.Argument(help="A report saved with `nanhunt replay --json`.")],
    *,
    out: Annotated[
        Path | None, typer.Option(help="The folder; by default REPORT-repro beside the report.")
    ] = None,
) -> None:
    """Run a report's command again and write a script of its culprit for torch alone."""
    from nanhunt import store

    saved = store.load(report)
    wanted = _culprit_of(saved, report)
    words = _words_of(saved, report)
    with progress() as tell:
        tell("torch")
        from nanhunt.hunting import Order, Plan, investigate
        from nanhunt.report.repro import sentence

        order = Order(out or report.with_name(f"{report.stem}-repro"), wanted)
        given = Wanted(
            words["subject"],
            words["factory"],
            words["trust"],
            _options(words["option"]),
            words["seed"],
            words["device"],
        )
        with given.opened(tell) as opened:
            steps = words["steps"] or 1
            plan = Plan(words["batch"] or 0, (), progress=tell, steps=steps, repro=order)
            again, _ = investigate(opened.subject, plan)
    if again.repro is None:
        typer.echo(f"the culprit of {report} did not come again: {again.headline}")
        raise typer.Exit(NOT_REPRODUCIBLE)
    typer.echo(sentence(replace(again, samples=saved.samples)))
    raise typer.Exit(0 if again.repro.works else CULPRIT)


def _culprit_of(saved: Report, path: Path) -> Finding:
    """The culprit that is to be shown: the first."""
    if not saved.culprits:
        raise UsageError(
            f"{path} names no culprit (it says {saved.verdict}); give a report that names one"
        )
    first = saved.culprits[0]
    if first.phase == "data":
        raise UsageError(
            f"{path}: there is nothing to run: no op made it, {first.where or first.op} was "
            f"non-finite before the step"
        )
    return first


def _words_of(saved: Report, path: Path) -> dict[str, Any]:
    """The options of the command that made a report, by name."""
    try:
        words = shlex.split(saved.command)
    except ValueError:
        words = []
    if words[:2] != ["nanhunt", "replay"]:
        raise UsageError(
            f"{path} does not tell how to run it again: its command is {saved.command!r}; give a "
            f"report that `nanhunt replay --json` wrote"
        )
    command: Any = typer.main.get_command(app)
    try:
        parsed: dict[str, Any] = command.commands["replay"].make_context("replay", words[2:]).params
    except Exception as error:
        told = getattr(error, "format_message", None)  # what the option parser raises
        if told is None:
            raise
        raise UsageError(
            f"{path}: its command cannot be read again ({told().rstrip('.')}); give a report that "
            f"this nanhunt wrote"
        ) from None
    return parsed


def _save(report: Report, trace: Trace, *, json: Path | None, events: Path | None) -> None:
    """Write the report and its events where they were asked for."""
    if events is not None:
        from nanhunt.report.events import save

        save(trace, events)
    if json is not None:
        from nanhunt import store

        store.save(report, json)


def _chosen(**forms: bool) -> list[str]:
    """The names of the forms that were asked for besides the report."""
    return [name for name, is_wanted in forms.items() if is_wanted]


@app.command()
def subjects() -> None:
    """List the subjects that installed packages offer."""
    from nanhunt.loading import installed

    for entry in installed():
        typer.echo(f"{entry.name:<16} {entry.value}")


add_to(app)


def _names(values: list[str] | None) -> list[str]:
    return [name.strip() for value in values or () for name in value.split(",") if name.strip()]


def _options(texts: list[str] | None) -> dict[str, Any]:
    """The options of the factory, as `--set` gives them."""
    from nanhunt.loading import read_option

    return dict(read_option(text) for text in texts or ())


def _check_steps(seeds: int, steps: int) -> None:
    if seeds and steps > 1:
        raise UsageError(
            f"--seeds {seeds} with --steps {steps}: other initialisations have not taken these "
            f"steps; give one of the two"
        )


def _tell_missing(report: Report, repro: Path | None) -> None:
    """Say that a script was asked for and there is nothing to show."""
    if repro is not None and report.repro is None:
        typer.echo(f"nothing written to {repro}: the step as given has no culprit")


def _leave(report: Report, *, exit_code: bool) -> None:
    """Leave with the code that a report deserves, where that was asked for."""
    differs = report.capsule is not None and report.capsule.bits == "differs"
    if exit_code and (report.deterministic is False or differs):
        raise typer.Exit(NOT_REPRODUCIBLE)
    if exit_code and report.verdict in ("culprit", "unexplained"):
        raise typer.Exit(CULPRIT)


def _print(report: Report, *forms: str) -> None:
    from nanhunt.report import renderer

    console = wide_console()
    for form in forms:
        console.print(renderer(form)(report))


def main() -> None:
    """Run the command line; every deliberate refusal is one sentence and exit code 2."""
    excepthook = sys.excepthook
    try:
        code = app(prog_name="nanhunt", standalone_mode=False)
    except NanhuntError as error:
        code = _refuse(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        told = getattr(error, "format_message", None)  # what the option parser raises
        if told is None:
            raise
        code = _refuse(told())
    if code == INTERRUPTED:  # also what typer itself makes of Ctrl-C
        typer.echo("nanhunt: interrupted", err=True)
    if callable(code):  # a program that `nanhunt run` has prepared
        sys.excepthook = excepthook  # typer has put its own there
        code()
    sys.exit(code if isinstance(code, int) else 0)


def _refuse(sentence: str) -> int:
    typer.echo(f"nanhunt: {' '.join(sentence.split())}", err=True)
    return REFUSED


if __name__ == "__main__":
    main()
