"""Places: (u_x, u_y, 1/r) and their derivatives against the points' own functions."""

import math

import pytest
import torch

from ris_model.config import PRESETS
from ris_model.geometry import (
    name_places,
    place_elements,
    place_points,
    steer,
    steer_places,
    steer_planar,
)

FULL = PRESETS["full"].scenario
POSITIONS = place_elements(FULL)
POINTS = torch.tensor(
    [[0.7, -0.4, 0.6], [-1.0, 0.5, 3.0], [0.0, 0.0, 9.0], [0.2, 0.1, 50.0]], dtype=torch.float64
)


@pytest.mark.parametrize("model", ["exact", "second-order"])
def test_places_steer_as_points_do(model):
    """The same wave in other coordinates."""
    a, _ = steer_places(POSITIONS, place_points(POINTS), wavenumber=FULL.wavenumber, model=model)
    expected = steer(POSITIONS, POINTS, wavenumber=FULL.wavenumber, model=model)
    assert torch.allclose(a, expected, atol=1e-12)


def test_names_are_the_inverse_of_places():
    """There and back."""
    assert torch.allclose(name_places(place_points(POINTS)), POINTS)
    assert name_places(torch.tensor([0.0, 0.0, 0.0])).tolist() == [0.0, 0.0, math.inf]


@pytest.mark.parametrize("model", ["exact", "second-order"])
def test_derivatives_are_those_of_finite_differences(model):
    """Central differences of the phase, in double precision, also in the far field."""
    places = torch.cat((place_points(POINTS), torch.tensor([[0.3, -0.2, 0.0]]).double()))
    _, partial = steer_places(POSITIONS, places, wavenumber=FULL.wavenumber, model=model)
    step = 1e-6
    for axis in range(3):
        move = torch.zeros(3, dtype=torch.float64)
        move[axis] = step
        ahead, _ = steer_places(POSITIONS, places + move, wavenumber=FULL.wavenumber, model=model)
        back, _ = steer_places(POSITIONS, places - move, wavenumber=FULL.wavenumber, model=model)
        slope = -(ahead * back.conj()).angle() / (2 * step * FULL.wavenumber)
        assert torch.allclose(partial[:, axis], slope, atol=1e-8)


def test_the_far_field_is_planar():
    """At 1/r = 0 nothing cancels, in single precision either."""
    angles = POINTS[:, :2]
    places = place_points(POINTS).float()
    places[:, 2] = 0.0
    a, _ = steer_places(POSITIONS.float(), places, wavenumber=FULL.wavenumber)
    planar = steer_planar(POSITIONS, angles, wavenumber=FULL.wavenumber)
    assert torch.allclose(a.to(planar.dtype), planar, atol=1e-5)


def test_mirrored_places_have_mirrored_waves():
    """Turning the surface by 180 degrees is turning the direction."""
    places = place_points(POINTS)
    a, _ = steer_places(POSITIONS, places, wavenumber=FULL.wavenumber)
    mirrored = places * torch.tensor([-1.0, -1.0, 1.0]).double()
    b, _ = steer_places(POSITIONS, mirrored, wavenumber=FULL.wavenumber)
    assert torch.allclose(a, b.flip(-1), atol=1e-12)


def test_positions_may_differ_from_scene_to_scene():
    """[B, N, 2] positions steer as each scene's own do."""
    both = torch.stack((POSITIONS, 1.01 * POSITIONS))
    points = POINTS.view(2, 2, 3)
    a = steer(both, points, wavenumber=FULL.wavenumber)
    for scene in range(2):
        alone = steer(both[scene], points[scene], wavenumber=FULL.wavenumber)
        assert torch.allclose(a[scene], alone)
