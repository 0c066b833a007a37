"""Cells: coordinates there and back, targets and peaks."""

import math

import pytest
import torch

from ris_model.cells import Cells, lay_cells
from ris_model.config import PRESETS
from ris_model.data import draw_batch
from ris_model.geometry import place_points

SMALL = PRESETS["small"]
CELLS = lay_cells(SMALL.scenario, SMALL.detector)
TINY = Cells(counts=(9, 7, 4), start=(-0.8, -0.5, 0.5), step=(0.2, 1 / 6, 0.5))


def draw_points(count: int = 1000) -> torch.Tensor:
    """Points all over the field of view."""
    batch = draw_batch(SMALL.scenario, seed=0, split="train", index=0, size=count)
    return batch.points[:, 0].double()


def test_points_come_back():
    """Resolve undoes locate everywhere in view."""
    points = draw_points()
    assert torch.allclose(CELLS.resolve(CELLS.locate(points)), points, atol=1e-9)


def test_field_of_view_lies_inside_the_grid():
    """No source is further than the outermost cells."""
    place = CELLS.locate(draw_points())
    assert place.min() >= 0
    assert (place <= torch.tensor(CELLS.counts) - 1).all()


def test_corners_stand_at_the_limits():
    """The first and the last cell in direction cosines and inverse range."""
    listed = CELLS.list_coordinates(torch.zeros((), dtype=torch.float64))
    place = listed * torch.tensor(CELLS.step) + torch.tensor(CELLS.start)
    edge = torch.tensor([math.sin(math.pi / 3), 0.5, 1 / 0.5], dtype=torch.float64)
    assert torch.allclose(place[-1], edge, atol=1e-6)
    assert torch.allclose(place[0], torch.tensor([-edge[0], -0.5, 1 / 3]).double(), atol=1e-6)
    assert len(listed) == CELLS.total == SMALL.detector.cells


def test_listing_and_flattening_agree():
    """The index of each listed cell is its position."""
    assert TINY.flatten(TINY.list_coordinates(torch.zeros(()))).tolist() == list(range(252))


@pytest.mark.parametrize("far", [-3.0, 0.0, 12.0])
def test_every_coordinate_has_finite_points_and_gradients(far):
    """Outside the field of view and below 1/r = 0, too."""
    place = (TINY.list_coordinates(torch.zeros(())) + far).requires_grad_()
    points = TINY.resolve(place)
    points.sum().backward()
    assert points.isfinite().all()
    assert (points[:, 2] > 0).all()
    assert place.grad.isfinite().all()
    assert (place.grad.abs().amax(-1) > 0).all()


def test_inverse_range_bends_without_a_jump():
    """Value and slope agree on both sides of the bend."""
    middle = (0.75 * 0.5 - 0.5) / 0.5
    place = torch.tensor([[4.0, 3.0, middle - 1e-6], [4.0, 3.0, middle + 1e-6]]).double()
    place.requires_grad_()
    r = TINY.resolve(place)[:, 2]
    r.sum().backward()
    assert r[0].item() == pytest.approx(r[1].item(), rel=1e-5)
    assert place.grad[0, 2].item() == pytest.approx(place.grad[1, 2].item(), rel=1e-4)


def test_surrounding_cells_share_one_source():
    """Weights of sum 1, their mean close to the place, nothing outside the grid."""
    place = CELLS.locate(draw_points())
    index, weight = CELLS.surround(place)
    assert index.shape == weight.shape == (1000, 27)
    assert torch.allclose(weight.sum(-1), torch.ones(1000, dtype=torch.float64))
    centre = (CELLS.list_coordinates(place)[index] * weight[..., None]).sum(-2)
    assert (centre - place).abs().max() < 0.8
    corner, share = TINY.surround(torch.zeros(1, 3))
    assert set(corner[share > 0].tolist()) == {0, 1, 9, 10, 63, 64, 72, 73}


def test_nearest_cell_weighs_most():
    """The blob stands on its source."""
    place = CELLS.locate(draw_points(50))
    index, weight = CELLS.surround(place)
    best = index.gather(-1, weight.argmax(-1, keepdim=True))[:, 0]
    assert torch.equal(best, CELLS.flatten(place))


def test_peaks_keep_out_of_each_other_s_shadow():
    """A neighbour of the hottest cell is passed over for a cooler one far away."""
    heat = torch.zeros(1, 252)
    heat[0, TINY.flatten(torch.tensor([4.0, 3.0, 1.0]))] = 9.0
    heat[0, TINY.flatten(torch.tensor([5.0, 3.0, 1.0]))] = 8.0
    heat[0, TINY.flatten(torch.tensor([8.0, 6.0, 1.0]))] = 7.0
    wanted = TINY.flatten(torch.tensor([[4.0, 3.0, 1.0], [8.0, 6.0, 1.0]]))
    assert torch.equal(TINY.pick_peaks(heat, 2)[0], wanted)
    assert len(set(TINY.pick_peaks(torch.zeros(1, 252), 5)[0].tolist())) == 5


def test_listed_places_are_those_of_the_coordinates():
    """Steps from the start."""
    like = torch.zeros((), dtype=torch.float64)
    places = CELLS.list_places(like)
    assert places[0].tolist() == pytest.approx(list(CELLS.start))
    assert torch.allclose(places[1] - places[0], like.new_tensor((CELLS.step[0], 0.0, 0.0)))
    exist = places[:, :2].square().sum(-1) < 0.9  # the corners belong to no direction
    there = place_points(CELLS.resolve(CELLS.list_coordinates(like)))
    assert torch.allclose(there[exist], places[exist])
