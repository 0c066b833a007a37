"""The entrance: `watch`, whose arguments become choices."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nanhunt.errors import UsageError
from nanhunt.records import Figures, Report
from nanhunt.trials import BUDGET
from nanhunt.watching.choices import Choices, listed
from nanhunt.watching.loop import Watch


def watch(  # noqa: PLR0913 - one parameter for each choice, all by name
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    scaler: Any = None,
    scheduler: Any = None,
    clip: float | None = None,
    accumulate: int = 1,
    policy: Literal["skip", "raise"] = "skip",
    stop_after: int | None = 20,
    capsules: str | Path | None = None,
    on_report: Callable[[Report], object] | None = None,
    log: str | Path | Callable[[Figures], object] | Any = None,
    keep_previous: bool = False,
    measure_every: int = 100,
    groups: Mapping[str, Iterable[str | nn.Parameter]] | None = None,
    variants: Iterable[str] = (),
    budget: float = BUDGET,
    subject: str = "",
    agree: Callable[[Tensor], Tensor] | None = None,
) -> Watch:
    """Guard the steps of a training: `watch.step(closure)` takes one, unless it is not finite.

    Args:
        model: the module that is trained.
        optimizer: or a list of them, which step together; `clip` then goes over all.
        scaler: a `GradScaler`. A step that it skips is normal while its scale is above 1.
        scheduler: or a list; stepped after each step that happened.
        clip: largest norm of all gradients, to the bit as `clip_grad_norm_(parameters, clip)`.
        accumulate: micro-batches of a step; each loss is divided by it.
        policy: what is done after a step that is not finite: it is skipped, or the error raised.
        stop_after: raise once so many in a row were not finite; None never does.
        capsules: a folder in which failing steps are kept.
        on_report: called with each new report instead of printing it on standard error.
        log: where the figures of each step go: the name of a CSV file for `nanhunt health`, a
            TensorBoard writer or what else has `add_scalar`, or a function of `Figures`.
        keep_previous: keep a copy of parameters, gradients and optimizer state from before each
            step, so that one which an optimizer made non-finite is replayed too.
        measure_every: after how many steps the size of an update is measured; 0 never.
        groups: as of a `Subject`; by these the norms are told.
        variants: precisions that a failing step is also replayed in, as `"fp64"`.
        budget: seconds that trials of fixes may take, for each new culprit.
        subject: `"pkg.mod:factory"`, written into capsules.
        agree: told 1 or 0 on the device, whether this process skips; answers for all of them.
    """
    if isinstance(variants, str) or not isinstance(variants, Iterable):
        raise UsageError(f"variants are names, as in ['fp64']; got {variants!r}")
    return Watch(
        Choices(
            model=model, optimizers=listed(optimizer), scaler=scaler, schedulers=listed(scheduler),
            clip=clip, accumulate=accumulate, capsules=Path(capsules) if capsules else None,
            policy=policy, stop_after=stop_after, keep_previous=keep_previous, subject=subject,
            variants=tuple(variants), measure_every=measure_every, on_report=on_report,
            groups={} if groups is None else groups, agree=agree, budget=budget, log=_opened(log),
        )
    )  # fmt: skip


def _opened(log: Any) -> Callable[[Figures], object] | None:
    if log is None:
        return None
    from nanhunt.report.health import open_log

    return open_log(log)
