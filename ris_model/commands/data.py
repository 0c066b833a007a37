"""Data: `generate` shards of scenes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ris_model.commands.options import Preset, answering_wrong_input, ask_whole

if TYPE_CHECKING:
    from ris_model.config import Split


def generate(
    out: Annotated[Path, typer.Option(help="Folder of the shards; may hold several splits.")],
    *,
    preset: Preset = "full",
    split: Annotated[str, typer.Option(help="train, val or test.")] = "train",
    scenes: Annotated[int | None, typer.Option(help="The preset's number without it.")] = None,
    shard_size: Annotated[int, typer.Option(help="Scenes of a shard.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the scenes.")] = 0,
) -> None:
    """Write scenes to disk; shards that are there already are checked and kept."""
    from ris_model.config import choose_preset
    from ris_model.shards import Plan, write_shards

    with answering_wrong_input():
        config, chosen = choose_preset(preset), _choose_split(split)
        if scenes is None:
            scenes = config.training.count_scenes(chosen)
        plan = Plan(
            scenario=config.choose_scenario(chosen),
            split=chosen,
            seed=ask_whole("seed", seed, 0),
            scenes=ask_whole("scenes", scenes, 1),
            shard_size=ask_whole("shard-size", shard_size, 1),
        )
        made = 0
        for number, (path, new) in enumerate(write_shards(plan, out), 1):
            made += new
            what = "written" if new else "kept"
            typer.echo(f"[{number}/{plan.shards}] {path} {what}")
    kept = plan.shards - made
    typer.echo(f"{plan.scenes} scenes of {split} in {out}: {made} shards written, {kept} kept")


def _choose_split(split: str) -> Split:
    """Return the split of that name."""
    from ris_model.config import SPLITS

    for known in SPLITS:
        if known == split:
            return known
    msg = f"there is no split {split!r}; choose one of {', '.join(SPLITS)}"
    raise ValueError(msg)
