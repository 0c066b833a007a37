"""The command line: `ris-model describe` and `ris-model step`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ris_model.config import Scenario
    from ris_model.subject import Subject

app = typer.Typer(
    help="A near-field localisation model behind a reconfigurable surface.",
    no_args_is_help=True,
    add_completion=False,
)

Preset = Annotated[str, typer.Option(help="tiny, small or full.")]


@app.command()
def describe(preset: Preset = "full") -> None:
    """Show the array, its distances and the parameters of a preset."""
    from rich.console import Console
    from rich.table import Table

    from ris_model.config import choose_preset
    from ris_model.subject import incident

    with _answering_wrong_input():
        config = choose_preset(preset)
        # two scenes are enough to see which parameters the objective reaches
        subject = incident(preset, batch_size=2)
    table = Table("quantity", "value", title=f"ris_model, preset {preset}")
    for name, value in (*_describe_scenario(config.scenario), *_describe_model(subject)):
        table.add_row(name, value)
    Console().print(table)


@app.command()
def step(
    *,
    preset: Preset = "tiny",
    profile: Annotated[str, typer.Option(help="Which system: incident.")] = "incident",
    batch: Annotated[int, typer.Option(help="Index of the training batch.")] = 0,
    amp: Annotated[str, typer.Option(help="off, bf16 or fp16.")] = "off",
    seed: Annotated[int, typer.Option(help="Of the parameters and the data.")] = 0,
) -> None:
    """Run forward and backward of one batch; show the terms, the loss and the gradients."""
    import torch

    from ris_model.subject import build

    with _answering_wrong_input():
        subject = build(profile, preset, seed=seed, amp=amp)
        scenes = subject.batches(batch)
    torch.manual_seed(subject.seed)
    terms = subject.loss_fn(subject.model, scenes)
    for name, term in terms.items():
        typer.echo(f"{name:<16}{term.item():.6f}")
    _propagate(subject, sum(terms.values(), start=torch.zeros(())))
    loss = math.fsum(term.item() for term in terms.values())
    typer.echo(f"[DEBUG] Loss is {'finite' if math.isfinite(loss) else 'not finite'}: {loss:.6f}")
    norms = {
        group: _measure_gradient(subject.model.get_submodule(prefix) for prefix in prefixes)
        for group, prefixes in subject.groups.items()
    }
    shown = " ".join(f"{group}={norm:.3e}" for group, norm in norms.items())
    typer.echo(f"[GRAD] {shown} ok={all(map(math.isfinite, norms.values()))}")


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
    _propagate(subject, sum(terms.values(), start=torch.zeros(())))
    parameters = list(subject.model.parameters())
    yield "parameters", f"{sum(p.numel() for p in parameters):,}"
    for group, prefixes in subject.groups.items():
        inside = [p for name in prefixes for p in subject.model.get_submodule(name).parameters()]
        yield f"  {group}", f"{sum(p.numel() for p in inside):,}"
    yield "  without gradient", f"{sum(p.numel() for p in parameters if p.grad is None):,}"


def _propagate(subject: Subject, loss: Tensor) -> None:
    """Backward, through the scaler and back to true gradients where there is one."""
    if subject.scaler is None:
        loss.backward()
        return
    subject.scaler.scale(loss).backward()
    subject.scaler.unscale_(subject.optimizer)


def _measure_gradient(modules: Iterator[nn.Module]) -> float:
    """Norm of all gradients of some modules, as they are: nothing is cleaned before the check."""
    from torch.nn.utils import get_total_norm

    found = [p.grad for module in modules for p in module.parameters() if p.grad is not None]
    return get_total_norm(found).item()


@contextmanager
def _answering_wrong_input() -> Iterator[None]:
    """Turn a wrong option into its one sentence and exit code 2."""
    try:
        yield
    except (ValueError, IndexError) as error:
        typer.echo(f"ris-model: {error}", err=True)
        raise typer.Exit(2) from None


def main() -> None:
    """Run the command line."""
    app(prog_name="ris-model")


if __name__ == "__main__":
    main()
