"""Keeping the failing step on disk: a capsule of it, from the state before it."""

import math
import warnings
from pathlib import Path

from nanhunt.capsule import CapsuleFolder, capture
from nanhunt.processes import rank_here
from nanhunt.subject import told
from nanhunt.watching.scene import Scene


class Keeping:
    """The folder of a watch; nothing here ever raises into the training."""

    def __init__(self, folder: Path) -> None:
        self._folder = CapsuleFolder(folder)
        self._has_warned = False

    def keep(self, scene: Scene, *, loss: float, fingerprint: str, note: str) -> Path | None:
        """Store the step; the model stands as before it."""
        choices = scene.choices
        try:
            capsule = capture(
                choices.model,
                scene.call.batch,
                scaler=choices.live_scaler,
                generators=scene.generators,
                loss=loss if math.isfinite(loss) else None,
                fingerprint=fingerprint,
                step=scene.step,
                rank=rank_here(),
                subject=choices.subject,
                note=note,
            )
            return self._folder.store(capsule)
        except Exception as error:  # noqa: BLE001 - whatever it was, the training goes on
            if not self._has_warned:
                self._has_warned = True
                text = f"nanhunt: step {scene.step} could not be kept: {told(error)}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
            return None
