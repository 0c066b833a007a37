"""Cells: the grid over (u_x, u_y, 1/r) on which sources are sought, and the way back to points.

Coordinates count cells from the first one: (column, row, plane), real numbers; whole ones are
centres. Flattened column fastest, then row, then plane.

Shapes: B scenes, K sources, G cells, `...` any leading dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import torch

from ris_model.config import DetectorSize, Scenario
from ris_model.geometry import point_direction

# Widths of the target around a source, cells.
_BLOB = (0.6, 0.6, 0.8)
# Half axes of the ellipsoid around a peak in which no second one is taken, cells.
_SHADOW = (1.6, 1.6, 3.0)
# Least square of the third direction cosine; that of the widest direction in view is 0.19.
_LEAST_COSINE2 = 0.1
# Below this share of the smallest 1/r in view, 1/r is bent so that it stays positive.
_BEND = 0.75


@dataclass(frozen=True, slots=True)
class Cells:
    """A regular grid over direction cosines and inverse range."""

    counts: tuple[int, int, int]  # columns, rows, planes
    start: tuple[float, float, float]  # (u_x, u_y, 1/r) of cell 0, the last in 1/m
    step: tuple[float, float, float]

    @property
    def total(self) -> int:
        """G, number of cells."""
        return math.prod(self.counts)

    def list_coordinates(self, like: torch.Tensor) -> torch.Tensor:
        """Whole coordinates of every cell, [G, 3], in the dtype and on the device of `like`."""
        axes = [torch.arange(count, device=like.device) for count in reversed(self.counts)]
        plane, row, column = torch.meshgrid(*axes, indexing="ij")
        return torch.stack((column.flatten(), row.flatten(), plane.flatten()), dim=-1).to(like)

    def list_places(self, like: torch.Tensor) -> torch.Tensor:
        """(u_x, u_y, 1/r) of every cell, [G, 3], in the dtype and on the device of `like`."""
        coordinates = self.list_coordinates(like)
        return coordinates * like.new_tensor(self.step) + like.new_tensor(self.start)

    def locate(self, points: torch.Tensor) -> torch.Tensor:
        """Coordinates of (phi, theta, r) points, [..., 3] from [..., 3] in rad, rad, m."""
        u = point_direction(points[..., 0], points[..., 1])
        place = torch.cat((u, 1.0 / points[..., 2:]), dim=-1)
        return (place - place.new_tensor(self.start)) / place.new_tensor(self.step)

    def resolve(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Return the (phi, theta, r) points of coordinates, [..., 3] in rad, rad, m.

        theta = atan(u_y / sqrt(u_x^2 + u_z^2)),  phi = atan(u_x / u_z),  u_z^2 = 1 - u_x^2 - u_y^2

        Inverse of `locate` in the field of view. Outside, where cells lie that no direction
        belongs to, u_z^2 keeps a floor and 1/r is bent, w -> f / (2 - w/f) below f, so that
        value and gradient stay finite for every coordinate: nothing is clamped to a constant.
        """
        place = coordinates * coordinates.new_tensor(self.step) + coordinates.new_tensor(self.start)
        x, y, inverse = place.unbind(-1)
        z2 = (1.0 - x.square() - y.square()).clamp_min(_LEAST_COSINE2)
        phi = torch.atan2(x, z2.sqrt())
        theta = torch.atan2(y, (x.square() + z2).sqrt())
        floor = _BEND * self.start[2]
        bent = floor / (2.0 - inverse.clamp_max(floor) / floor)
        inverse = torch.where(inverse > floor, inverse, bent)
        return torch.stack((phi, theta, 1.0 / inverse), dim=-1)

    def surround(self, coordinates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the 27 cells around places, with the weight that a target gives to each.

        Gaussian of widths (0.6, 0.6, 0.8) cells, 0 outside the grid, of sum 1.

        Args:
            coordinates: [..., 3]; a place outside the grid counts as one at its edge.

        Returns:
            index [..., 27] of flattened cells and weight [..., 27].
        """
        last = coordinates.new_tensor(self.counts) - 1
        inside = coordinates.clamp(torch.zeros_like(last), last)
        around = coordinates.new_tensor(list(product((-1, 0, 1), repeat=3)))
        cells = inside.round()[..., None, :] + around
        distance = (cells - inside[..., None, :]) / coordinates.new_tensor(_BLOB)
        exists = ((cells >= 0) & (cells <= last)).all(-1)
        weight = torch.where(exists, (-0.5 * distance.square().sum(-1)).exp(), 0.0)
        return self.flatten(cells.clamp(torch.zeros_like(last), last)), weight / weight.sum(
            -1, keepdim=True
        )

    def flatten(self, cells: torch.Tensor) -> torch.Tensor:
        """Flattened index of whole coordinates, [...] int64 from [..., 3]."""
        column, row, plane = cells.round().long().unbind(-1)
        return (plane * self.counts[1] + row) * self.counts[0] + column

    def pick_peaks(self, heat: torch.Tensor, count: int) -> torch.Tensor:
        """Return the hottest cells, none in the shadow of another, hottest first.

        Args:
            heat: [B, G]; read without gradient.
            count: how many.

        Returns:
            index [B, count] int64.
        """
        left = heat.detach().clone()
        found = []
        for _ in range(count):
            index = left.argmax(-1)
            found.append(index)
            shadow = self.cast_shadows(index[:, None])[:, 0]
            left = left.masked_fill(shadow, torch.finfo(left.dtype).min)
        return torch.stack(found, dim=-1)

    def cast_shadows(self, index: torch.Tensor) -> torch.Tensor:
        """Which cells lie in the shadow of the cells of an index, [B, Q, G] bool from [B, Q]."""
        own = torch.stack(torch.unravel_index(index, tuple(reversed(self.counts))), dim=-1)
        parts = []
        for axis, (count, reach) in enumerate(
            zip(reversed(self.counts), _SHADOW[::-1], strict=True)
        ):
            line = torch.arange(count, device=index.device)
            parts.append(((line - own[..., axis, None]) / reach).square())
        plane, row, column = parts
        distance = plane[..., :, None, None] + row[..., None, :, None] + column[..., None, None, :]
        return (distance < 1.0).flatten(2)


def lay_cells(scenario: Scenario, size: DetectorSize) -> Cells:
    """Spread the cells of a size over the field of view of a scenario, edges included."""
    half = (math.sin(scenario.azimuth_limit), math.sin(scenario.elevation_limit))
    start = (-half[0], -half[1], 1.0 / scenario.range_max)
    end = (half[0], half[1], 1.0 / scenario.range_min)
    counts = (size.columns, size.rows, size.planes)
    steps = [(b - a) / (n - 1) for a, b, n in zip(start, end, counts, strict=True)]
    return Cells(counts=counts, start=start, step=(steps[0], steps[1], steps[2]))
