"""Train: `train` a model, alone or under torchrun."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ris_model.commands.options import answering_wrong_input, ask_whole

if TYPE_CHECKING:
    from ris_model.checkpoint import Origin
    from ris_model.config import Config
    from ris_model.training.journal import Listener
    from ris_model.training.loop import StalledError, Trainer
    from ris_model.training.ranks import Ranks

# How many SIGINT only ask for an end.
_INTERRUPTS = 2
# What the options mean that are not given when a run is begun.
_DEFAULTS = {"preset": "small", "profile": "sound", "seed": 0, "amp": "off", "curriculum": False}


@dataclass(frozen=True, slots=True)
class Request:
    """The options of a run as they were given; None where they were not."""

    preset: str | None
    profile: str | None
    steps: int | None
    batch: int | None
    amp: str | None
    seed: int | None
    data: str | None
    curriculum: bool | None
    config: Path | None

    def choose(self, name: str) -> Any:
        """Return an option or its default."""
        given = getattr(self, name)
        return _DEFAULTS.get(name) if given is None else given


def train(  # noqa: PLR0913  the options of the command
    out: Annotated[Path, typer.Option(help="Folder of the checkpoints and the metrics.")],
    *,
    preset: Annotated[str | None, typer.Option(help="tiny, small or full; else small.")] = None,
    profile: Annotated[str | None, typer.Option(help="sound or incident; else sound.")] = None,
    steps: Annotated[int | None, typer.Option(help="The preset's number without it.")] = None,
    batch: Annotated[int | None, typer.Option(help="Scenes of a step, all processes.")] = None,
    amp: Annotated[str | None, typer.Option(help="fp16, bf16 or off; else off.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of parameters and data; else 0.")] = None,
    data: Annotated[Path | None, typer.Option(help="Shards; drawn on the fly without.")] = None,
    curriculum: Annotated[bool | None, typer.Option(help="Three phases; else one.")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON that `search` wrote.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Train a model; Ctrl-C saves and ends, --resume goes on where it was.

    The same command under `torchrun --nproc-per-node K` shares every batch among K processes.
    """
    from ris_model.training.ranks import join_ranks

    shards = None if data is None else str(data.resolve())
    request = Request(preset, profile, steps, batch, amp, seed, shards, curriculum, config)
    with answering_wrong_input(), join_ranks(device) as ranks, _watching_signals() as signals:
        ending = _train(request, out, ranks, resume=resume, signals=signals)
    if ending == "interrupted":
        raise typer.Exit(128 + signals[0])


def _train(
    request: Request,
    out: Path,
    ranks: Ranks,
    *,
    resume: bool,
    signals: list[int],
) -> str:
    """Train to an end, and return which; nothing of the run is left behind, as `Ranks` asks."""
    from ris_model.training.loop import StalledError

    trainer, listeners = _prepare(request, out, ranks, resume=resume, signals=signals)
    try:
        ending = trainer.run()
    except StalledError as error:
        _report_stall(error, trainer.setting.origin, ranks)
        raise typer.Exit(1) from None
    finally:
        for listener in listeners:
            listener.close()
    if ranks.leads:
        _report_end(trainer, ending, out)
    return ending


def _prepare(
    request: Request,
    out: Path,
    ranks: Ranks,
    *,
    resume: bool,
    signals: list[int],
) -> tuple[Trainer, list[Listener]]:
    """Put a run together; its listeners exist on the leading process only."""
    from ris_model.checkpoint import LAST, load_checkpoint
    from ris_model.subject import assemble
    from ris_model.training.feeds import draw_feeds, read_feeds
    from ris_model.training.loop import Setting, Trainer
    from ris_model.training.schedule import CURRICULUM, PLAIN

    last = out / LAST
    step = 0
    if resume:
        checkpoint = load_checkpoint(last)
        origin, step = checkpoint.origin, int(checkpoint.state["counters"]["step"])
        _refuse_changes(request, origin, out)
    elif last.exists():
        msg = f"{out} holds a run already; give --resume to go on with it, or another --out"
        raise ValueError(msg)
    else:
        origin = _begin(request)
    settings: dict[str, Any] = {"seed": origin.seed, "ranks": ranks}
    feeds = (
        read_feeds(origin.config, Path(origin.data), **settings)
        if origin.data
        else draw_feeds(origin.config, **settings)
    )
    subject = assemble(
        origin.config, origin.profile, seed=origin.seed, amp=origin.amp, device=ranks.device
    )
    _make_folder(out)
    listeners = _listen(out, origin.config.training.steps, step=step) if ranks.leads else []
    setting = Setting(
        subject=subject,
        origin=origin,
        feeds=feeds,
        ranks=ranks,
        out=out,
        phases=CURRICULUM if origin.curriculum else PLAIN,
        listeners=listeners,
        interrupted=lambda: bool(signals),
    )
    trainer = Trainer(setting)
    if resume:
        trainer.resume(last)
    return trainer, listeners


def _make_folder(out: Path) -> None:
    """Make the folder of a run before there is anything to lose."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"{out} cannot be made a folder ({error.strerror}); give another --out"
        raise ValueError(msg) from None


def _begin(request: Request) -> Origin:
    """Return what a new run is begun with."""
    from ris_model.checkpoint import Origin
    from ris_model.subject import choose_config

    if request.config is None:
        config = choose_config(request.choose("profile"), request.choose("preset"))
    elif request.preset is not None:
        msg = "give --config or --preset, not both: each is a whole configuration"
        raise ValueError(msg)
    else:
        config = _read_config(request.config)
    given = {"batch_size": request.batch, "steps": request.steps}
    changes = {
        name: ask_whole(name, value, 1) for name, value in given.items() if value is not None
    }
    return Origin(
        config=replace(config, training=replace(config.training, **changes)),
        profile=request.choose("profile"),
        seed=ask_whole("seed", request.choose("seed"), 0),
        amp=request.choose("amp"),
        preset="" if request.config is not None else request.choose("preset"),
        data=request.data or "",
        curriculum=request.choose("curriculum"),
    )


def _read_config(path: Path) -> Config:
    """Read a configuration that `search` wrote."""
    import json

    from ris_model.config import Config
    from ris_model.storage import read_fields

    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"{path} cannot be read as JSON ({error}); give the best.json of a search"
        raise ValueError(msg) from None
    return read_fields(Config, values, place=f"{path}: Config")


def _refuse_changes(request: Request, origin: Origin, out: Path) -> None:
    """Raise a ValueError for an option that says otherwise than the run that is resumed."""
    training = origin.config.training
    begun = {"steps": training.steps, "batch": training.batch_size, "config": request.config}
    for field in fields(Request):
        given = getattr(request, field.name)
        held = begun.get(field.name, getattr(origin, field.name, None))
        if given is not None and given != held:
            msg = (
                f"the run in {out} was begun with --{field.name} {held}, not {given}; leave it "
                "out, or begin another run"
            )
            raise ValueError(msg)


@contextlib.contextmanager
def _watching_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM; the third SIGINT interrupts at once.

    Under torchrun one Ctrl-C comes twice: from the terminal, and passed on by torchrun.
    """
    came: list[int] = []

    def note(number: int, _: object) -> None:
        came.append(number)
        if came.count(signal.SIGINT) > _INTERRUPTS:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _listen(out: Path, steps: int, *, step: int) -> list[Listener]:
    """Whoever is told: the console, the table, TensorBoard where it is installed."""
    from ris_model.commands.console import Console
    from ris_model.training.journal import Board, Table

    console = Console(steps, step=step)
    listeners: list[Listener] = [console, Table(out / "metrics.csv", step=step)]
    try:
        listeners.append(Board(out / "tensorboard", step=step))
    except ImportError:
        console.hear(
            "TensorBoard is not installed: metrics go to metrics.csv alone "
            "(pip install 'nanhunt[ris]' for both)"
        )
    return listeners


def _report_end(trainer: Trainer, ending: str, out: Path) -> None:
    """Say how a run ended."""
    best = trainer.at.best
    if ending == "interrupted":
        typer.echo(
            f"interrupted after batch {trainer.at.step}; go on with: "
            f"ris-model train --out {out} --resume"
        )
    elif ending == "stopped early":
        stale = trainer.at.stale
        typer.echo(f"stopped early: {stale} epochs without a better validation loss")
    if best is not None:
        typer.echo(f"Best val loss: {best:.6f}")


def _report_stall(error: StalledError, origin: Origin, ranks: Ranks) -> None:
    """Say that nothing is learnt any more, and what finds out why."""
    if not ranks.leads:
        return
    options = f"--seed {origin.seed}"
    if error.first:
        options += f" --steps {error.first + 1}"
    command = (
        f"nanhunt replay ris:{origin.profile} --set preset={origin.preset or 'PRESET'} "
        f"--set batch_size={origin.config.training.batch_size} --set amp={origin.amp} {options}"
    )
    typer.echo(f"ris-model: {error}; find the operation with: {command}", err=True)
