"""Guess: candidates for sources, from a network's heat map or from an image without a network.

Shapes: B scenes, G cells, J candidates.
"""

from __future__ import annotations

import torch

from ris_model.cells import Cells
from ris_model.data import Batch
from ris_model.images import Imaging
from ris_model.network import Detection


def guess_by_detection(detection: Detection, cells: Cells, count: int) -> torch.Tensor:
    """Take the hottest cells, moved by their offsets, [B, J, 3] (u_x, u_y, 1/r), hottest first."""
    index = detection.heat.topk(min(count, cells.total), dim=-1).indices
    offsets = detection.offsets.gather(1, index[..., None].expand(-1, -1, 3))
    return cells.list_places(offsets)[index] + offsets * offsets.new_tensor(cells.step)


def guess_together(detection: Detection, cells: Cells, count: int) -> torch.Tensor:
    """Take the peaks of a heat map, none in the shadow of another, [B, K, 3], hottest first."""
    index = cells.pick_peaks(detection.heat, count)
    offsets = detection.offsets.gather(1, index[..., None].expand(-1, -1, 3))
    return cells.list_places(offsets)[index] + offsets * offsets.new_tensor(cells.step)


def guess_by_image(imaging: Imaging, batch: Batch, cells: Cells, count: int) -> torch.Tensor:
    """Take the brightest cells of a whitened image, [B, J, 3] (u_x, u_y, 1/r), brightest first.

    That of the smallest ridge, divided by what the surface can send from each place where the
    imaging knows that.
    """
    images = imaging.measure(batch.y, batch.h, batch.codes)
    image = images[:, -1] if imaging.size.illuminated else images[:, len(imaging.size.ridges) - 1]
    index = image.topk(min(count, cells.total), dim=-1).indices
    return cells.list_places(image)[index]
