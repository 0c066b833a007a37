"""Calibrate: offsets of the elements beside the sources."""

import math
from dataclasses import replace

import pytest
import torch

from ris_model.cells import lay_cells
from ris_model.config import PRESETS
from ris_model.estimate.bound import bound_covariance, widen
from ris_model.estimate.calibrate import (
    _differentiate_offsets,
    bound_calibrated,
    calibrate,
    doubt_offsets,
)
from ris_model.estimate.field import lay_out_batch
from ris_model.estimate.fit import refine
from ris_model.estimate.guess import guess_by_image
from ris_model.estimate.localise import Plan, localise
from ris_model.geometry import place_points
from ris_model.images import Imaging

SMALL = PRESETS["small"]
REACH = 0.05 * SMALL.scenario.wavelength / 2


@pytest.fixture
def scenes(draw_scenes):
    """Scenes at 20 dB whose elements are off by up to 5 %."""

    def make(sources: int, size: int, error: float = 0.05, level: float = 20.0):
        snr = {"snr_min": level, "snr_max": level}
        world = {**snr, "position_error": error}
        return draw_scenes(SMALL.scenario, sources=sources, size=size, **world)

    return make


def test_derivatives_by_offsets_are_those_of_finite_differences(scenes):
    """Of every element, in x and in y."""
    batch = scenes(2, 1)
    exact = widen(lay_out_batch(batch, SMALL.scenario))
    exact = replace(exact, positions=exact.positions[None])
    places, s = place_points(batch.points.double()), batch.symbols.mT.to(torch.complex128)
    found = _differentiate_offsets(exact, places, s)

    def respond(positions):
        moved = replace(exact, positions=positions)
        return (moved.respond(moved.steer(places)) * s[:, :, None]).sum(1)

    for element, axis in ((0, 0), (0, 1), (20, 0), (35, 1)):
        step = torch.zeros_like(exact.positions)
        step[0, element, axis] = 1e-7
        slope = (respond(exact.positions + step) - respond(exact.positions - step)) / 2e-7
        assert torch.allclose(found[:, 2 * element + axis], slope, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("sources", [1, 2])
def test_errors_fall_and_stay_above_the_hybrid_bound(scenes, sources):
    """Against the fit that takes the surface for what it is said to be, scene by scene."""
    batch = scenes(sources, 128, level=30.0)
    measurements = lay_out_batch(batch, SMALL.scenario)
    true = place_points(batch.points[:, :sources])
    blind, _ = refine(measurements, true[:, None], steps=6)
    _, places = calibrate(measurements, true, reach=REACH, steps=4)
    s = batch.symbols[..., :sources]
    bound = bound_calibrated(
        measurements, true, s, noise=batch.noise_variance, reach=REACH
    ).diagonal(dim1=-2, dim2=-1)
    sigma = bound.unflatten(-1, (sources, 3))[..., :2].sqrt()
    errors = [((p - true)[..., :2] / sigma).square() for p in (blind[:, 0], places)]
    energy = [error.sum((-2, -1)) for error in errors]
    assert (energy[1] < energy[0]).double().mean() > 0.55
    assert 0.3 < errors[1].median() < 0.7  # of the square of a normal number it is 0.455


def test_without_reach_the_hybrid_bound_is_the_plain_one(scenes):
    """And it grows with the reach."""
    batch = scenes(2, 4)
    measurements = lay_out_batch(batch, SMALL.scenario)
    places, noise = place_points(batch.points), batch.noise_variance
    plain = bound_covariance(measurements, places, batch.symbols, noise=noise)
    bounds = [
        bound_calibrated(measurements, places, batch.symbols, noise=noise, reach=reach)
        for reach in (1e-9, REACH, 2 * REACH)
    ]
    assert torch.allclose(bounds[0], plain, rtol=1e-3)
    traces = [bound.diagonal(dim1=-2, dim2=-1).sum(-1) for bound in bounds]
    assert (traces[0] < traces[1]).all()
    assert (traces[1] < traces[2]).all()


def test_offsets_are_not_taken_for_sources(scenes):
    """K is right more often when the offsets are found too."""
    batch = scenes(1, 64, error=0.1)
    cells = lay_cells(SMALL.scenario, SMALL.detector)
    imaging = Imaging(SMALL.scenario, SMALL.detector, cells)
    places = guess_by_image(imaging, batch, cells, 64)
    measurements = lay_out_batch(batch, SMALL.scenario)
    right = []
    with torch.inference_mode():
        for plan in (Plan(), Plan(reach=2 * REACH)):
            answer = localise(measurements, places, plan=plan, cells=cells)
            right.append((answer.count == 1).float().mean().item())
    assert right[1] > max(right[0], 0.9)


def test_nominal_surfaces_are_not_doubted(scenes):
    """The prior of no offset is its greatest value; moved ones cost."""
    measurements = lay_out_batch(scenes(1, 2), SMALL.scenario)
    assert doubt_offsets(measurements, reach=REACH).tolist() == [0.0, 0.0]
    still = measurements.positions.expand(2, -1, -1)
    moved = replace(measurements, positions=still + REACH / math.sqrt(3))
    expected = pytest.approx([36.0, 36.0], rel=1e-3)
    assert doubt_offsets(moved, reach=REACH).tolist() == expected
