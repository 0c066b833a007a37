"""The checks by their ids: which function looks at what."""

from collections.abc import Mapping
from types import MappingProxyType

from nanhunt.gate.case import Check
from nanhunt.gate.finite import check_gradients, check_loss, check_parameters
from nanhunt.gate.norms import check_baseline, check_bounds
from nanhunt.gate.objective import check_learning, check_terms, check_weights
from nanhunt.gate.precision import check_fp64, check_halves, check_steady

RUN: Mapping[str, Check] = MappingProxyType(
    {
        "NH001": check_loss,
        "NH002": check_gradients,
        "NH003": check_parameters,
        "NH004": check_learning,
        "NH005": check_terms,
        "NH006": check_weights,
        "NH007": check_bounds,
        "NH008": check_baseline,
        "NH009": check_halves,
        "NH010": check_steady,
        "NH011": check_fp64,
    }
)
