"""The checks by their ids, which stay; what each is for stands in `docs/checks.md`."""

from dataclasses import dataclass

PAGE = "docs/checks.md"


@dataclass(frozen=True, slots=True)
class Check:
    """One check: its id, a name for programs, what it asks for, and what to do where it fails."""

    id: str
    slug: str
    title: str
    help: str


CHECKS = (
    Check(
        "NH001",
        "finite-loss",
        "the loss is finite",
        "The message names the operation that first made a non-finite value, and its line. "
        "`nanhunt replay` tells why, and what makes it go away.",
    ),
    Check(
        "NH002",
        "finite-gradients",
        "every gradient is finite",
        "The loss is finite and its backward is not: the message names the forward operation whose "
        "backward is at fault, and its line. `nanhunt replay` tells what makes it go away.",
    ),
    Check(
        "NH003",
        "finite-parameters",
        "every parameter is finite after one step",
        "Loss and gradients are finite, and the optimizer makes a parameter non-finite: look at "
        "eps, at the learning rate and at the optimizer's state.",
    ),
    Check(
        "NH004",
        "every-parameter-learns",
        "every trainable parameter receives a gradient",
        "The loss does not depend on the parameter: a head that is not used, a detach, a value "
        "taken out with .item(). Freeze it, use it, or allow it by its name.",
    ),
    Check(
        "NH005",
        "no-silent-term",
        "no term of the loss is silently 0",
        "A term that is exactly 0, or has no graph, teaches nothing: look at its weight, its mask "
        "and whatever it is multiplied by.",
    ),
    Check(
        "NH006",
        "weights-as-configured",
        "the live weights are those configured",
        "The objective holds another weight than the configuration names: look for names that are "
        "easily confused, and for a value that is read once and never again.",
    ),
    Check(
        "NH007",
        "norms-within-bounds",
        "gradient norms and their ratios are within bounds",
        "A group of parameters gets a gradient that is larger or smaller than [tool.nanhunt] "
        "thresholds allow.",
    ),
    Check(
        "NH008",
        "norms-near-baseline",
        "gradient norms are near those of the baseline",
        "The gradient of a group has grown or shrunk by more than the factor since the baseline "
        "was written. If that was meant, `nanhunt gate --update-baseline` and review the change.",
    ),
    Check(
        "NH009",
        "no-half-loss",
        "no operation of the loss runs in half precision",
        "A loss in half precision overflows above 65504 or keeps 8 bits: compute it outside of "
        "autocast, or cast with .float() before.",
    ),
    Check(
        "NH010",
        "deterministic",
        "two native replays agree to the bit",
        "Nothing that a gate measures can be relied on where a step does not come out twice the "
        "same: look for state in closures, generators of your own and threads.",
    ),
    Check(
        "NH011",
        "agrees-with-fp64",
        "FP32 gradients agree with FP64",
        "The gradients lose digits to cancellation or to ill-conditioned operations: the message "
        "names the group that loses most.",
    ),
    Check(
        "NH012",
        "allowance-in-force",
        "no allowance has expired",
        "Remove what it allows, or decide anew and give it another date.",
    ),
)
BY_ID = {check.id: check for check in CHECKS}
