"""The hunt as an assertion, for any test runner."""

from collections.abc import Callable, Sequence
from typing import Any

from nanhunt.errors import UsageError
from nanhunt.gate import Gated
from nanhunt.records import Report, Run


class NonFiniteBackward(AssertionError):  # noqa: N818 - an assertion, as those of a test
    """A step is not finite; the message is the short report, `report` the whole one."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


def assert_finite_backward(
    model: Any,
    loss_fn: Callable[..., Any],
    batch: Any,
    *,
    variants: Sequence[str] = ("native",),
    optimizer: Any = None,
    seed: int = 0,
) -> None:
    """Assert that one training step is finite: its loss, its gradients and its parameters.

    Everything is put back to the bit. A healthy step costs one plain step per variant.

    Args:
        model: the module whose parameters are trained.
        loss_fn: `loss_fn(model, *batch)` returns a scalar tensor, or a mapping of named terms.
        batch: a tuple is splatted, anything else is one argument.
        variants: how the step is replayed: `native`, `fp64`, `fp32`, `amp-fp16`, `amp-bf16`,
            `amp-fp16-net`, `amp-bf16-net`; `native` is always among them.
        optimizer: stepped once if it is given.
        seed: under which the random generators stand when the step starts.

    Raises:
        AssertionError: a variant is not finite or cannot be run; the message is the short report.
        SubjectError: the step as given cannot be run.
        UsageError: there is no such variant.
    """
    __tracebackhide__ = True
    from nanhunt.gating import examine
    from nanhunt.subject import Subject
    from nanhunt.variants import variant

    if isinstance(variants, str):
        raise UsageError(f"variants are names, as in ['fp64']; got {variants!r}")
    rule = Gated("", variants=tuple(variant(name).name for name in variants))
    subject = Subject(model, [batch], loss_fn, optimizer=optimizer, seed=seed)
    report = examine(subject, rule, is_repeated=False)
    failed = [run for run in report.runs if not run.is_finite]
    if failed:
        raise NonFiniteBackward(_told(report, failed), report)


def _told(report: Report, failed: Sequence[Run]) -> str:
    """The short report, and a line for each variant that failed besides or instead."""
    from nanhunt.analysis import describe_nonfinite
    from nanhunt.report.short import tell

    others = [run for run in failed if run.variant != "native"]
    lines = [tell(report)] if len(others) < len(failed) else []
    for run in others:
        where = f": {run.culprit} at {run.culprit_line or 'a line not known'}"
        what = describe_nonfinite(run)
        lines.append(f"{run.variant}: {what}{where if run.culprit else ''}")
    return "\n".join(lines)
