"""The table of symptoms: a name, what is asked, when it applies, what to do; `docs/health.md`."""

from collections.abc import Callable
from dataclasses import dataclass

from nanhunt.health import gradients, losses, steps, updates
from nanhunt.health.course import Course
from nanhunt.health.symptom import Answer


@dataclass(frozen=True, slots=True)
class Rule:
    """One row: a name, a title, when it applies, what to do, and what others call it."""

    slug: str
    title: str
    when: str
    advice: str
    find: Callable[[Course], Answer]
    known_as: str = ""


RULES: tuple[Rule, ...] = (
    Rule(
        "nonfinite_loss",
        "The loss is not finite",
        "The loss of a step is NaN or infinite, be it only once.",
        "`nanhunt replay` of that step names the operation and the line that made it.",
        losses.find_nonfinite,
        "SageMaker Debugger: NaN, Inf in losses; Lightning: detect_anomaly",
    ),
    Rule(
        "nonfinite_gradients",
        "Gradients are not finite",
        "A gradient is NaN or infinite in a step that is not one of those that a GradScaler skips "
        "as it should.",
        "`nanhunt replay` of that step names the operation whose backward made it.",
        gradients.find_nonfinite,
        "SageMaker Debugger: ExplodingTensor",
    ),
    Rule(
        "nonfinite_validation",
        "A validation loss is not finite",
        "A validation loss that was told is NaN or infinite.",
        "If the training loss is finite, look at what differs in eval(): running statistics, a "
        "batch of another size, data that training never sees, half precision without a scaler.",
        losses.find_nonfinite_validation,
    ),
    Rule(
        "sanitised_gradients",
        "Gradients were made finite before they were checked",
        "The loop replaces NaN in gradients (nan_to_num, a hook) before anything looks at them: "
        "the step is made, with a gradient that is wrong.",
        "Check first, and skip the step; then look for the operation with `nanhunt replay`.",
        gradients.find_sanitised,
    ),
    Rule(
        "exploding_gradients",
        "Gradients explode",
        "The gradient norm is a hundred times its median so far and ten times the highest before, "
        "in five steps in a row while the loss does not reach a new low, or on the way to a step "
        "that is not finite.",
        "Clip the gradient norm, lower the learning rate or warm it up; look at the group with the "
        "largest norm, and at what was in the batch of the first step.",
        gradients.find_exploding,
        "exploding gradients (Pascanu et al. 2013); SageMaker Debugger: ExplodingTensor; Cockpit: "
        "GradNorm",
    ),
    Rule(
        "vanishing_gradients",
        "Gradients vanish",
        "A group's gradient norm is below a millionth of the largest group's, or all are below "
        "1e-7 and the loss has not fallen.",
        "Look for saturated sigmoids and softmaxes, for products of many small factors, for a loss "
        "scale that is too small for float16; residual paths and normalisation help.",
        gradients.find_vanishing,
        "SageMaker Debugger: VanishingGradient",
    ),
    Rule(
        "dead_parameters",
        "A group of parameters gets no gradient",
        "A group's gradient norm is exactly 0 in the last 32 steps and longer, while others get "
        "one or the loss has not fallen.",
        "Look for units of ReLU that are never on, a loss term whose weight is 0, a detach, "
        "a mask that hides everything; freeze the group if it is meant.",
        gradients.find_dead,
        "SageMaker Debugger: DeadRelu; dying ReLU",
    ),
    Rule(
        "parameters_do_not_move",
        "Parameters do not move",
        "‖Δθ‖/‖θ‖ of a group is below 1e-9, which rounds to nothing, in every later step in which "
        "it was measured and the learning rate was at work.",
        "Is the group in the optimizer, and are these the tensors that the model uses (a copy, a "
        "model moved or wrapped after the optimizer was made)? In half precision keep float32 "
        "copies of the parameters.",
        updates.find_unmoved,
        "SageMaker Debugger: UnchangedTensor, NotUpdatingWeights",
    ),
    Rule(
        "update_ratio",
        "Updates are out of proportion to the weights",
        "The median of ‖Δθ‖/‖θ‖ is above 0.5, or above 0.2 or below 1e-6 while the loss does not "
        "fall. Usual is 1e-3.",
        "Raise or lower the learning rate of that group by the factor that is missing.",
        updates.find_ratio,
        "update-to-weight ratio (Karpathy); SageMaker Debugger: WeightUpdateRatio; Cockpit: "
        "UpdateSize",
    ),
    Rule(
        "loss_not_decreasing",
        "The loss does not decrease",
        "No later tenth of the run has a lower median than the first, a fall of 5 % can be ruled "
        "out, and the medians differ by no more than noise, or the loss more than doubles.",
        "Can the model learn one batch by heart? If not, look at the loss, the labels and whether "
        "the parameters move; if it can, at the learning rate and the data. A run that was resumed "
        "at its plateau, and one of two losses that play against each other, need not decrease.",
        losses.find_flat,
        "SageMaker Debugger: LossNotDecreasing",
    ),
    Rule(
        "loss_spikes",
        "The loss spikes",
        "The loss leaps by eight robust standard deviations of the 64 steps before, in three steps "
        "in a row, and comes back within 256 steps or to a quarter of its height within 8; or it "
        "leaps ten times as far as it ever moved, and stays there. A leap in the 64 steps after "
        "the learning rate was raised is none.",
        "Lower the learning rate or Adam's beta2, clip the gradient norm, and look at the "
        "batches of the steps before.",
        losses.find_spikes,
        "loss spikes (PaLM, OPT)",
    ),
    Rule(
        "skipped_in_a_row",
        "Steps are skipped in a row",
        "Five steps in a row were not made, or seventeen for overflow under a GradScaler, which "
        "halves its scale from 65536 to 1 in sixteen.",
        "Nothing is trained meanwhile: `nanhunt replay` of the first of them says why.",
        steps.find_skipped,
        "DeepSpeed, fairseq: loss scale at its minimum",
    ),
    Rule(
        "skipped_often",
        "Many steps are skipped",
        "A tenth or more of the steps since the first that was made were not made.",
        "A scaler tries a larger scale once in 2000 steps and loses one step by it; whatever skips "
        "more often hides a fault that `nanhunt replay` can name.",
        steps.find_often_skipped,
    ),
    Rule(
        "scale_collapse",
        "The loss scale collapses",
        "The scale of the GradScaler falls below 1, where a smaller one is no remedy.",
        "The gradients are not finite at any scale: `nanhunt replay --precision amp-fp16` finds "
        "the operation. Compute it outside of autocast, or use bfloat16.",
        steps.find_scale_collapse,
        "DeepSpeed: Current loss scale already at minimum; fairseq: Minimum loss scale reached",
    ),
    Rule(
        "scheduler_without_optimizer",
        "The scheduler steps without the optimizer",
        "The scheduler was stepped after a step that was not made.",
        "Step it only when the optimizer stepped: under a GradScaler, when the scale has not "
        "fallen. `nanhunt.watch` does that.",
        steps.find_scheduler_alone,
        "torch: lr_scheduler.step() before optimizer.step()",
    ),
    Rule(
        "optimizer_without_scheduler",
        "The optimizer steps without the scheduler",
        "There is a scheduler and it was never stepped in 1000 steps, or it is stepped in most "
        "steps and left out in others. Once an epoch is no symptom.",
        "Step it where the optimizer steps, on every path through the loop.",
        steps.find_optimizer_alone,
    ),
    Rule(
        "rate_zero",
        "The learning rate is 0",
        "Every learning rate is 0 in ten steps in a row.",
        "The schedule is over, or was made for fewer steps than are taken: count in steps what it "
        "counts in steps.",
        steps.find_rate_zero,
    ),
    Rule(
        "rate_constant",
        "The scheduler does not change the learning rate",
        "The scheduler was stepped 1000 times, and no learning rate ever changed.",
        "It may belong to another optimizer than the one that steps, or its milestones count "
        "epochs. If the rate is meant to be constant, leave the scheduler out.",
        steps.find_rate_constant,
    ),
    Rule(
        "clipped_always",
        "Gradients are clipped at every step",
        "Nineteen of twenty steps in the later half of the run, at least a hundred, were clipped.",
        "Clipping sets the size of every step then, and the learning rate is not what it says: "
        "raise the limit to some quantile of the norms, or lower the learning rate instead.",
        gradients.find_clipped,
    ),
)
BY_SLUG = {rule.slug: rule for rule in RULES}
