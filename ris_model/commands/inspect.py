"""Inspect: `describe` a preset, make one `step`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from ris_model.commands.options import Preset, Profile, answering_wrong_input

if TYPE_CHECKING:
    from ris_model.config import Scenario
    from ris_model.subject import Subject


def describe(*, preset: Preset = "full", profile: Profile = "incident") -> None:
    """Show the array, its distances and the parameters of a preset."""
    from rich.console import Console
    from rich.table import Table

    from ris_model.config import choose_preset
    from ris_model.subject import build

    with answering_wrong_input():
        config = choose_preset(preset)
        # two scenes are enough to see which parameters the objective reaches
        subject = build(profile, preset, batch_size=2)
    table = Table("quantity", "value", title=f"ris_model, {profile}, preset {preset}")
    for name, value in (*_describe_scenario(config.scenario), *_describe_model(subject)):
        table.add_row(name, value)
    Console().print(table)


def step(
    *,
    preset: Preset = "tiny",
    profile: Profile = "incident",
    batch: Annotated[int, typer.Option(help="Index of the training batch.")] = 0,
    amp: Annotated[str, typer.Option(help="off, bf16 or fp16.")] = "off",
    seed: Annotated[int, typer.Option(help="Of the parameters and the data.")] = 0,
) -> None:
    """Make one safe training step; show the terms, the loss, the gradients and what was done."""
    import torch

    from ris_model.subject import build
    from ris_model.training import safe_step, write_log

    with answering_wrong_input():
        subject = build(profile, preset, seed=seed, amp=amp)
        scenes = subject.batches(batch)
    torch.manual_seed(subject.seed)
    outcome = safe_step(subject, scenes)
    for name, value in outcome.terms.items():
        typer.echo(f"{name:<16}{value:.6f}")
    for line in write_log(outcome, subject.weights()):
        typer.echo(line)


def _describe_scenario(scenario: Scenario) -> Iterator[tuple[str, str]]:
    """Rows about the array."""
    yield "elements N", f"{scenario.columns} x {scenario.rows} = {scenario.elements}"
    yield "antennas M", f"{scenario.antennas}"
    yield "snapshots L", f"{scenario.snapshots}"
    yield "sources K_MAX", f"{scenario.sources}"
    yield "wavelength", f"{scenario.wavelength:g} m"
    yield "spacing", f"{scenario.spacing:g} m"
    yield "aperture (diagonal)", f"{scenario.aperture:.2f} m"
    yield "Fraunhofer distance", f"{scenario.fraunhofer:.1f} m"


def _describe_model(subject: Subject) -> Iterator[tuple[str, str]]:
    """Rows about the parameters; those that the objective does not reach come from a backward."""
    import torch

    terms = subject.loss_fn(subject.model, subject.batches(0))
    torch.stack(list(terms.values())).sum().backward()
    parameters = list(subject.model.parameters())
    yield "parameters", f"{sum(p.numel() for p in parameters):,}"
    for group, prefixes in subject.groups.items():
        inside = [p for name in prefixes for p in subject.model.get_submodule(name).parameters()]
        yield f"  {group}", f"{sum(p.numel() for p in inside):,}"
    yield "  without gradient", f"{sum(p.numel() for p in parameters if p.grad is None):,}"
