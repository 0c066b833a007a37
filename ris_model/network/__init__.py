"""Network: one per profile; `Localiser` is the incident's, `Detector` the sound one."""

from ris_model.network.incident import Localiser, Prediction
from ris_model.network.sound import Detection, Detector, Sources, decode

__all__ = ["Detection", "Detector", "Localiser", "Prediction", "Sources", "decode"]
