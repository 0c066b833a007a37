"""Losses: one term per class, a table of them per profile; their weighted sum is the loss."""

from ris_model.losses.incident import INCIDENT_TERMS, prepare_prediction
from ris_model.losses.matching import match_slots, pick_slots, wrap_angle
from ris_model.losses.objective import Objective, SoundObjective
from ris_model.losses.sound import SOUND_TERMS, prepare_detection

__all__ = [
    "INCIDENT_TERMS",
    "SOUND_TERMS",
    "Objective",
    "SoundObjective",
    "match_slots",
    "pick_slots",
    "prepare_detection",
    "prepare_prediction",
    "wrap_angle",
]
