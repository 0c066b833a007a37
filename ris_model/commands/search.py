"""Search: `search` for better numbers, with as many workers as are started."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ris_model.commands.options import (
    Preset,
    Profile,
    answering_wrong_input,
    ask_whole,
    need_extra,
)

if TYPE_CHECKING:
    import optuna
    from rich.table import Table

    from ris_model.tuning.study import Search

# Trials that the table at the end shows.
_SHOWN = 10


def search(  # noqa: PLR0913  the options of the command
    *,
    trials: Annotated[int, typer.Option(help="Of all workers together.")] = 50,
    epochs: Annotated[int, typer.Option(help="Of a trial.")] = 12,
    space: Annotated[str, typer.Option(help="wide or narrow.")] = "wide",
    storage: Annotated[
        str, typer.Option(help="Database URL, or journal:FILE; workers share it.")
    ] = "sqlite:///search.db",
    preset: Preset = "small",
    profile: Profile = "sound",
    out: Annotated[Path, typer.Option(help="Folder of the table and the figures.")] = Path(
        "search"
    ),
    seed: Annotated[int | None, typer.Option(help="Of the sampler, for one worker.")] = None,
) -> None:
    """Search by Optuna; the same command again goes on, started beside it shares the work.

    Each trial is a short training; hopeless ones are ended early. A worker that is killed loses
    its trial alone, which the others repeat, whichever storage they share.
    """
    with answering_wrong_input():
        for package in ("optuna", "matplotlib"):
            need_extra(package)
        plan = _plan(trials, epochs, space, storage, (profile, preset), seed)
        from ris_model.tuning.study import find_best, run_search, write_results

        # told to end, a worker gives its trial back at once
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            study = run_search(plan, typer.echo)
        except KeyboardInterrupt:
            typer.echo("interrupted; the same command goes on")
            raise typer.Exit(130) from None
        finally:
            signal.signal(signal.SIGTERM, before)
        write_results(plan, study, out)
        _show(study)
        best = find_best(study)
        if best is None:
            _explain_failure(study)
            raise typer.Exit(1)
        _draw(study, out)
    typer.echo(f"[HPO] best value={best.value:.6f} trial={best.number}")
    typer.echo(
        f"train with it: ris-model train --profile {profile} --config {out / 'best.json'} --out DIR"
    )


def _plan(
    trials: int,
    epochs: int,
    space: str,
    storage: str,
    names: tuple[str, str],
    seed: int | None,
) -> Search:
    """Return what is searched."""
    from typing import cast

    from ris_model.config import Profile as ProfileName
    from ris_model.subject import choose_config
    from ris_model.tuning.spaces import choose_space
    from ris_model.tuning.study import Search

    profile, preset = names
    config = choose_config(profile, preset)
    known = cast("ProfileName", profile)
    return Search(
        config=config,
        profile=known,
        rows=choose_space(known, space),
        # what differs in any of these is another search
        name=f"ris-{profile}-{preset}-{space}-{ask_whole('epochs', epochs, 1)}",
        trials=ask_whole("trials", trials, 1),
        epochs=epochs,
        storage=storage,
        # Optuna's generators take 32 bits
        seed=None if seed is None else ask_whole("seed", seed, 0) % 2**32,
    )


def _show(study: optuna.Study) -> None:
    """Print the best trials."""
    from rich.console import Console
    from rich.table import Table

    trials = [trial for trial in study.get_trials() if trial.value is not None]
    trials.sort(key=lambda trial: trial.value or 0.0)
    table: Table = Table("trial", "value", "epochs", "choices", title=study.study_name)
    for trial in trials[:_SHOWN]:
        chosen = ", ".join(
            f"{name.partition('.')[2]}={_round(v)}" for name, v in trial.params.items()
        )
        epochs = str(len(trial.intermediate_values))
        table.add_row(str(trial.number), f"{trial.value:.6g}", epochs, chosen)
    Console().print(table)


def _round(value: object) -> str:
    """Return a choice as text."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _explain_failure(study: optuna.Study) -> None:
    """Say why no trial had a finite objective."""
    reasons = [trial.user_attrs.get("reason") for trial in study.get_trials()]
    told = next((reason for reason in reasons if reason), "none was finished")
    typer.echo(f"ris-model: no trial had a finite objective ({told})", err=True)


def _draw(study: optuna.Study, out: Path) -> None:
    """Draw the figures."""
    from ris_model.tuning.pictures import draw_history, draw_parameters

    for name, draw in (("history.png", draw_history), ("parameters.png", draw_parameters)):
        draw(study, out / name)
        typer.echo(f"wrote {out / name}")
