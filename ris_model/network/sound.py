"""The sound network: whitened images, a small CNN, a heat map of cells with offsets.

What is physics is computed (`images`), what remains is translation-equivariant: which cell, and
where in it. Sources are read off by `decode`; the covariance is built from them, not predicted.

Shapes: B scenes, G cells, K source slots (K_MAX), D channels, P planes.
"""

from __future__ import annotations

import torch
from torch import nn

from ris_model.cells import Cells, lay_cells
from ris_model.config import Config
from ris_model.data import Batch
from ris_model.images import Imaging
from ris_model.linalg import at_least_fp32
from ris_model.network.detection import Detection, bound
from ris_model.network.queries import SetHead

# Numbers per cell: heat, 3 offsets, 3 log-scales, log power.
_PER_CELL = 8
# Normalisation groups of the convolutions' channels.
_GROUPS = 8
# Spread of the raw numbers of a cell before training.
_FIRST_SPREAD = 0.1
# Bounds, all smooth: an offset in cells, the middle and span of a log-scale, of a log power, and
# of the logarithm of the noise. Inside them exp() is far from every limit of FP32.
_OFFSET_SPAN = 1.5
_SCALE_MIDDLE, _SCALE_SPAN = -1.5, 3.5
_POWER_SPAN = 8.0
_NOISE_MIDDLE, _NOISE_SPAN = -5.0, 5.0


class Residual(nn.Module):
    """x + conv(gelu(norm(conv(gelu(norm(x))))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(_GROUPS, channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(_GROUPS, channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, D, rows, columns] to the same."""
        moved: torch.Tensor = x + self.body(x)
        return moved


class ImageBackbone(nn.Module):
    """Batch to features of every direction, and to the levels of its images."""

    def __init__(self, config: Config, cells: Cells) -> None:
        super().__init__()
        size = config.detector
        self.imaging = Imaging(config.scenario, size, cells)
        # the planes of every image, and two coordinates
        self.stem = nn.Conv2d(size.images * size.planes + 2, size.channels, 3, padding=1)
        self.blocks = nn.Sequential(*(Residual(size.channels) for _ in range(size.blocks)))
        self.norm = nn.GroupNorm(_GROUPS, size.channels)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features [B, D, rows, columns] and levels [B, 2 C]."""
        images, levels = self.imaging(batch.y, batch.h, batch.codes)
        planes = images.flatten(1, 2)
        rows, columns = (
            torch.linspace(-1.0, 1.0, n, dtype=planes.dtype, device=planes.device)
            for n in planes.shape[-2:]
        )
        place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
        x = torch.cat((planes, place.expand(planes.shape[0], -1, -1, -1)), dim=1)
        features: torch.Tensor = self.norm(self.blocks(self.stem(x.to(self.stem.weight.dtype))))
        return nn.functional.gelu(features), levels


class HeatHead(nn.Module):
    """Features to numbers per cell, number of sources and noise."""

    def __init__(self, config: Config, cells: Cells) -> None:
        super().__init__()
        size = config.detector
        self.planes = size.planes
        self.cells = nn.Conv2d(size.channels, size.planes * _PER_CELL, 1)
        # a nearly flat map to start with: no cell is preferred and no scale is sure of itself
        nn.init.normal_(self.cells.weight, std=_FIRST_SPREAD / size.channels**0.5)
        pooled = 2 * size.channels + 2 * size.images
        self.scene = nn.Sequential(
            nn.Linear(pooled, 64), nn.GELU(), nn.Linear(64, config.scenario.sources + 1)
        )
        self.queries = SetHead(config, cells) if size.queries else None

    def forward(self, features: torch.Tensor, levels: torch.Tensor) -> Detection:
        """Write a detection, in at least FP32 from the last product on."""
        raw = at_least_fp32(self.cells(features)).unflatten(1, (self.planes, _PER_CELL))
        raw_BGC = raw.permute(0, 1, 3, 4, 2).flatten(1, 3)
        pooled = torch.cat((features.mean((-2, -1)), features.amax((-2, -1))), dim=-1)
        scene = torch.cat((pooled, levels.to(pooled.dtype)), dim=-1)
        raw_scene = at_least_fp32(self.scene(scene))
        detection = Detection(
            heat=raw_BGC[..., 0],
            offsets=bound(raw_BGC[..., 1:4], _OFFSET_SPAN),
            log_scales=_SCALE_MIDDLE + bound(raw_BGC[..., 4:7], _SCALE_SPAN),
            log_power=bound(raw_BGC[..., 7], _POWER_SPAN),
            log_noise=_NOISE_MIDDLE + bound(raw_scene[:, 0], _NOISE_SPAN),
            k_logits=raw_scene[:, 1:],
        )
        return detection if self.queries is None else self.queries(features, detection)


class Detector(nn.Module):
    """Backbone and head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        cells = lay_cells(config.scenario, config.detector)
        self.backbone = ImageBackbone(config, cells)
        self.head = HeatHead(config, cells)

    def forward(self, batch: Batch) -> Detection:
        """Detect in every scene of the batch."""
        features, levels = self.backbone(batch)
        detection: Detection = self.head(features, levels)
        return detection
