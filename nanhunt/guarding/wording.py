"""From what an observer saw to a report: what is non-finite, who made it, in one line of a run."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nanhunt.causes import base_name
from nanhunt.places import told_finding
from nanhunt.records import Finding, Group, OpEvent, Report, Run, Sink
from nanhunt.versions import versions

_KINDS = {"nan": "NaN", "inf": "infinite", "nan and inf": "NaN or infinite"}
_PLACES = {"backward": "in a backward", "optimizer": "in the optimizer step"}


@dataclass(frozen=True, slots=True)
class Sight:
    """What was seen at a sink, or at a birth: a sentence, the sinks and the line of the run."""

    headline: str
    sinks: tuple[Sink, ...]
    run: Run


def see_loss(sink: Sink, loss: float) -> Sight:
    """A loss that is not finite."""
    return Sight(f"the loss is {loss}", (sink,), Run("native", loss=loss))


def see_gradients(
    sinks: tuple[Sink, ...], sizes: dict[str, int], loss: float | None, scale: float | None
) -> Sight:
    """Gradients that are not finite, and at which loss scale."""
    total = sum(sizes.values())
    known = "" if loss is None else f"the loss is finite ({loss:.4g}); "
    rest = "are not" if known else "are not finite"
    fits = "" if scale is None else f" at loss scale {scale:g}, and a smaller one is no remedy"
    headline = f"{known}{len(sinks)} of {total} gradients {rest}{fits}"
    found = {group: sum(sink.group == group for sink in sinks) for group in sizes}
    groups = tuple(
        Group(name, torch.nan, found[name], size) for name, size in sizes.items() if found[name]
    )
    run = Run("native", loss=torch.nan if loss is None else loss, groups=groups, scale=scale)
    return Sight(headline, sinks, run)


def see_parameters(sinks: tuple[Sink, ...], total: int, loss: float | None) -> Sight:
    """Parameters that an optimizer step left non-finite."""
    headline = f"after the optimizer step {len(sinks)} of {total} parameters are not finite"
    value = torch.nan if loss is None else loss
    return Sight(headline, sinks, Run("native", loss=value, stepped_nonfinite=len(sinks)))


def see_birth(event: OpEvent, sink: Sink) -> Sight:
    """A birth, at the moment at which it happens."""
    headline = "a non-finite value was born"
    if event.birth is not None:
        facts, place = event.outputs[event.birth.output], _PLACES.get(event.phase, "in the forward")
        made = f"{event.birth.count} {_KINDS[event.birth.kind]} of {facts.numel} elements"
        headline = f"{base_name(event.op)} returned {made}, {place}"
    return Sight(headline, (sink,), Run("native"))


def make_report(
    sight: Sight, findings: Sequence[Finding], *, subject: str, device: str, step: int
) -> Report:
    """The report of what was seen, with the culprits that were found."""
    culprits = tuple(told_finding(finding) for finding in findings[:1])
    first = culprits[0] if culprits else None
    line = f"{first.file}:{first.line}" if first and first.file else None
    run = sight.run
    told = Run(
        run.variant,
        loss=run.loss,
        groups=run.groups,
        stepped_nonfinite=run.stepped_nonfinite,
        culprit=first.op if first else None,
        culprit_dtype=first.dtype if first else None,
        culprit_line=line,
        scale=run.scale,
    )
    steps = f"{step} optimizer step{'' if step == 1 else 's'}"
    return Report(
        subject=subject,
        batch=0,
        verdict="culprit" if culprits else "unexplained",
        versions=versions(),
        device=device,
        threads=torch.get_num_threads(),
        headline=sight.headline,
        culprits=culprits,
        runs=(told,),
        notes=(f"seen while it ran, after {steps} in the block",),
        not_checked=("whether it comes again: nothing was replayed",),
    )
