"""Queries: the peaks of a heat map look at each other and at the whole view, and are corrected.

A convolution sees the neighbourhood of a cell. With five sources, whether a weak peak is a source
or a side lobe of stronger ones is decided by where all the others are: the hottest peaks become
queries of a small decoder (self-attention among them, cross-attention to the directions), which
moves them, raises or lowers their heat, and says how many there are. What comes out is a heat map
again, so nothing that reads one has to know.

Shapes: B scenes, G cells, Q queries, D channels, K source slots (K_MAX).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ris_model.cells import Cells
from ris_model.config import Config
from ris_model.linalg import at_least_fp32
from ris_model.network.detection import Detection, bound

# Of a query: heat, 3 offsets, 3 log-scales, log power, 3 coordinates.
_PER_QUERY = 11
# What is written for one: change of heat, of 3 offsets, of log power.
_WRITTEN = 5
_FIRST_SPREAD = 0.01
# How far a query may be moved, cells, and how much its log power may be changed.
_MOVE_SPAN = 1.0
_POWER_SPAN = 2.0


class SetHead(nn.Module):
    """Detection to a detection whose peaks were compared with each other."""

    def __init__(self, config: Config, cells: Cells) -> None:
        super().__init__()
        size = config.detector
        self.cells, self.count_max = cells, size.queries
        width = size.query_width
        self.embed = nn.Linear(size.channels + _PER_QUERY, width)
        self.view = nn.Linear(size.channels + 2, width)
        layer = nn.TransformerDecoderLayer(
            width,
            size.query_heads,
            2 * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.decoder = nn.TransformerDecoder(layer, size.query_layers, norm=nn.LayerNorm(width))
        self.write = nn.Linear(width, _WRITTEN)
        self.count = nn.Linear(2 * width, config.scenario.sources)
        for last in (self.write, self.count):  # nearly nothing is changed to start with
            nn.init.normal_(last.weight, std=_FIRST_SPREAD)
            nn.init.zeros_(last.bias)

    def forward(self, features: torch.Tensor, detection: Detection) -> Detection:
        """Correct a detection, [B, D, rows, columns] features beside it."""
        index = self.cells.pick_peaks(detection.heat, self.count_max)
        queries = self.embed(self._describe(features, detection, index))
        said_BQW = self.decoder(queries, self.view(_lay_view(features)))
        written = at_least_fp32(self.write(said_BQW))
        pooled = torch.cat((said_BQW.mean(1), said_BQW.amax(1)), dim=-1)
        shadow = self.cells.cast_shadows(index)
        change = torch.where(shadow, written[..., :1].to(detection.heat.dtype), 0.0).sum(1)
        spread = index[..., None].expand(-1, -1, 3)
        moves = bound(written[..., 1:4], _MOVE_SPAN).to(detection.offsets.dtype)
        power = bound(written[..., 4], _POWER_SPAN).to(detection.log_power.dtype)
        return replace(
            detection,
            heat=detection.heat + change,
            offsets=detection.offsets.scatter_add(1, spread, moves),
            log_power=detection.log_power.scatter_add(1, index, power),
            k_logits=detection.k_logits + at_least_fp32(self.count(pooled)),
        )

    def _describe(
        self,
        features: torch.Tensor,
        detection: Detection,
        index: torch.Tensor,
    ) -> torch.Tensor:
        """What is known of each peak, [B, Q, D + 11] in the precision of the features."""
        columns, rows, _ = self.cells.counts
        where = (index % (rows * columns))[:, None].expand(-1, features.shape[1], -1)
        own = features.flatten(2).gather(2, where).mT
        numbers = torch.cat(
            (
                (detection.heat - detection.heat.amax(-1, keepdim=True))[..., None],
                detection.offsets,
                detection.log_scales,
                detection.log_power[..., None],
            ),
            dim=-1,
        )
        numbers = numbers.gather(1, index[..., None].expand(-1, -1, numbers.shape[-1]))
        coordinates = self.cells.list_coordinates(numbers)[index]
        half = coordinates.new_tensor([max(1, n - 1) / 2 for n in self.cells.counts])
        place = (coordinates + numbers[..., 1:4]) / half - 1.0
        return torch.cat((own, numbers.to(own.dtype), place.to(own.dtype)), dim=-1)


def _lay_view(features: torch.Tensor) -> torch.Tensor:
    """Directions as tokens with their coordinates, [B, rows columns, D + 2]."""
    rows, columns = (
        torch.linspace(-1.0, 1.0, n, dtype=features.dtype, device=features.device)
        for n in features.shape[-2:]
    )
    place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
    joined = torch.cat((features, place.expand(len(features), -1, -1, -1)), dim=1)
    return joined.flatten(2).mT
