"""Network: one per profile; `Localiser` is the incident's, `Detector` the sound one."""

from ris_model.network.detection import Detection, Sources, decode
from ris_model.network.incident import Localiser, Prediction
from ris_model.network.sound import Detector

__all__ = ["Detection", "Detector", "Localiser", "Prediction", "Sources", "decode"]
