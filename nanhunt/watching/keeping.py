"""Keeping the failing step on disk: what a capsule of it holds, from the state before it."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nanhunt.versions import versions
from nanhunt.watching.scene import Scene


class Keeping:
    """The folder of a watch; nothing here ever raises into the training."""

    def __init__(self, folder: Path) -> None:
        self._folder = _capsules().CapsuleFolder(folder)

    def keep(self, scene: Scene, *, loss: float, fingerprint: str, note: str) -> Path | None:
        """Store the step; the model stands as before it."""
        choices = scene.choices
        home = _capsules()
        capsule = home.Capsule(
            model=tensors_of(choices.model),
            batch=scene.call.batch,
            generators=scene.generators,
            settings=home.read_settings(choices.model, scaler=choices.live_scaler),
            loss=loss if math.isfinite(loss) else None,
            fingerprint=fingerprint,
            step=scene.step,
            subject=choices.subject,
            versions=versions(),
            note=note,
        )
        stored: Path | None = self._folder.store(capsule)
        return stored


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name that they have, also those that no state_dict holds."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _capsules() -> Any:
    from importlib import import_module

    return import_module("nanhunt.capsule")
