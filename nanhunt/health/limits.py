"""Every threshold of the rules, with its reason.

They are wide on purpose: a rule that cries over a healthy run is switched off, and then it is worth
nothing. Where a limit is another tool's, that is said.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What the rules hold the figures against."""

    # Steps that share a median. Half of a block may be outliers before its median is one.
    block: int = 16
    # Steps below which nothing is said about a course: a tenth of them is still most of a block.
    course: int = 100
    # Gradients explode: so many times the median of all blocks before, and so many times the
    # highest of them, in so many steps in a row, or on the way to a step that is not finite.
    # A hundredfold is beyond the swing of GANs and of recurrent nets that are clipped.
    explosion: float = 100.0
    above_highest: float = 10.0
    explosion_steps: int = 5
    # A gradient norm that is as good as none (SageMaker Debugger's VanishingGradient: 1e-7), and
    # the part of the largest group's norm below which a group gets nothing: float32 has 7 digits.
    vanished: float = 1e-7
    vanished_part: float = 1e-6
    # Steps in a row, at the end of the run, in which a group gets no gradient at all.
    dead: int = 32
    # The update of a parameter that rounds to nothing in float32 (half an ulp is 6e-8 of it).
    unmoved: float = 1e-9
    # Update to weight: usually near 1e-3 (Karpathy, "A Recipe for Training Neural Networks").
    # From `fast` on the weights are new after five steps, from `replaced` on after two. Small
    # nets are trained well at a tenth.
    slow: float = 1e-6
    fast: float = 0.2
    replaced: float = 0.5
    # Measured updates below which nothing is said about them.
    measured: int = 5
    # The part of the highest learning rate from which on an update counts: neither the first
    # steps of a warm-up nor the last of a cosine say anything of the ratio.
    working_rate: float = 0.1
    # The loss does not decrease: a fall of so much of it can be ruled out by two standard errors.
    # Medians that differ by twice that, and by more than `flat`, are no noise: a loss that rises
    # and falls is not stuck, and one of two that play against each other does so.
    fall: float = 0.05
    flat: float = 0.01
    # A spike: so many robust standard deviations above the steps before it, in so many steps in a
    # row (a hard batch is over after one), by at least these parts of what the loss has moved
    # through and of its level, at once (the swings of a GAN are slopes), and over within
    # `recovered` steps. One that comes back in part must fall to a `remnant` of its height in
    # `settling` steps (a term that is switched on stays); one that stays must be `departure`
    # times as far as the loss ever moved.
    window: int = 64
    spike: float = 8.0
    spike_steps: int = 3
    spike_part: float = 0.1
    spike_rise: float = 0.2
    recovered: int = 256
    settling: int = 8
    remnant: float = 0.25
    departure: float = 10.0
    # Steps in a row that were not made. A GradScaler that starts at 65536 halves it 16 times
    # until it is 1, and may: the 17th is one too many.
    skipped: int = 5
    overflows: int = 17
    # The part of the steps that a GradScaler may skip once it has found its scale: it tries a
    # larger one every 2000 steps, so that a tenth is two hundred times what is usual.
    skipped_part: float = 0.1
    # Below a scale of 1 a smaller one is no remedy (DeepSpeed's min_loss_scale is 1).
    scale: float = 1.0
    # The part of the steps that are clipped, for it to be all of them.
    clipped_part: float = 0.95
    # Steps in a row with a learning rate of 0; a warm-up begins, and a cosine ends, with one.
    idle: int = 10
    # Steps of the scheduler after which a rate that never changed is remarkable.
    constant: int = 1000


LIMITS = Limits()
