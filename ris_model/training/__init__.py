"""Training: the safe step, the schedule, the average, the processes, and the run of them all."""

from ris_model.training.schedule import CURRICULUM, PLAIN, Phase, plan_rate
from ris_model.training.step import StepOutcome, Trainable, measure_groups, safe_step, write_log

__all__ = [
    "CURRICULUM",
    "PLAIN",
    "Phase",
    "StepOutcome",
    "Trainable",
    "measure_groups",
    "plan_rate",
    "safe_step",
    "write_log",
]
