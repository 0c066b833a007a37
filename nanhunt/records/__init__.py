"""What was measured and what follows from it: frozen records, standard library only.

The spine of the package. The rooms that know torch write these records; the rooms that tell about
them read them and never need torch. Nothing here holds a live tensor, and nothing renders itself.
"""

# fmt: off
# isort: off
from nanhunt.records.concluded import (
    ENDLESS, Ablation, Answer, Finding, Group, ModuleFacts, Provenance, Rank, RankState, Report,
    Reproduction, Run, Sameness, Sample, Step, Trial, Verdict,
)
from nanhunt.records.figured import SANITISED, Figures, Why
from nanhunt.records.gated import Checked, Difference, Outcome, Status
from nanhunt.records.measured import (
    Ancestor, Birth, Frame, HalfOp, Inquiry, Operand, OpEvent, Pace, Passage, Phase, Sink, SinkKind,
    Spectrum, TensorFacts, Term, Trace,
)
# isort: on

__all__ = [
    "ENDLESS", "SANITISED", "Ablation", "Ancestor", "Answer", "Birth", "Checked", "Difference",
    "Figures", "Finding", "Frame", "Group", "HalfOp", "Inquiry", "ModuleFacts", "OpEvent",
    "Operand", "Outcome", "Pace", "Passage", "Phase", "Provenance", "Rank", "RankState", "Report",
    "Reproduction", "Run", "Sameness", "Sample", "Sink", "SinkKind", "Spectrum", "Status", "Step",
    "TensorFacts", "Term", "Trace", "Trial", "Verdict", "Why",
]
# fmt: on
