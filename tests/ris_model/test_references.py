"""References: maximum likelihood with known K, MUSIC and MVDR, what a noise-free label gives."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ris_model.config import PRESETS
from ris_model.estimate.field import lay_out_batch, weigh_places
from ris_model.estimate.reference import fit_reference, measure_cost
from ris_model.estimate.spectra import ScanGrid, count_rank, scan, scan_ceiling
from ris_model.geometry import name_places, place_points
from ris_model.metrics import score, summarise

SMALL = PRESETS["small"].scenario


def judge(batch, points, count):
    """Summary of found points."""
    return summarise(
        score(batch.points, points, count=batch.count, found_count=count, snr_db=batch.snr_db)
    )


def test_cost_of_the_reference_is_the_cost_of_the_fit(draw_scenes):
    """Two programs, one number."""
    batch = draw_scenes(SMALL, sources=2, size=3)
    measurements = lay_out_batch(batch, SMALL)
    places = place_points(batch.points)
    expected = weigh_places(measurements, places[:, None])[:, 0]
    for i in range(3):
        rows = measurements.steer(places[i]).numpy() @ measurements.operator[i].numpy()
        found = measure_cost(rows, measurements.y[i].numpy())
        assert found == pytest.approx(expected[i].item(), rel=1e-3)


@pytest.mark.parametrize("sources", [1, 2])
def test_reference_finds_the_sources(draw_scenes, sources):
    """At 20 dB within a fraction of a degree, and at a cost no higher than the truth's."""
    batch = draw_scenes(SMALL, sources=sources, size=3, snr_min=20.0, snr_max=20.0)
    measurements = lay_out_batch(batch, SMALL)
    places = fit_reference(measurements, sources=sources)
    figures = judge(batch, name_places(places), batch.count)
    assert math.degrees(figures.median[0]) < 0.4
    true = place_points(batch.points[:, :sources])
    found = weigh_places(measurements, places.float()[:, None])
    assert (found <= weigh_places(measurements, true[:, None]) * 1.001).all()


def test_ceiling_is_far_below_a_beamwidth_but_not_zero(draw_scenes):
    """All scenes, K by rank, ranges sought: a scan of the label errs by its grid."""
    batch = draw_scenes(SMALL, sources=2, size=48)
    assert count_rank(batch.r_true).tolist() == [2] * 48
    spectrum = scan_ceiling(batch.r_true, SMALL)
    figures = judge(batch, spectrum.points, spectrum.count)
    assert math.degrees(figures.median[0]) < 0.5
    assert figures.median[0] > 0
    assert figures.misses < 0.1
    assert spectrum.map.shape == (48, 35, 61)


@pytest.mark.parametrize("kind", ["music", "mvdr"])
def test_one_strong_source_is_found_in_the_samples(draw_scenes, kind):
    """The sample covariance of 16 snapshots shows a single source at 20 dB."""
    batch = draw_scenes(SMALL, sources=1, size=32, snr_min=20.0, snr_max=20.0)
    spectrum = scan(batch.r_samp, SMALL, kind=kind, count=batch.count)
    figures = judge(batch, spectrum.points, spectrum.count)
    assert math.degrees(figures.median[0]) < 5


def test_music_is_one_over_the_noise_energy(draw_scenes):
    """The map against the plain formula at one node and plane."""
    batch = draw_scenes(SMALL, sources=2, size=1)
    grid = ScanGrid(columns=5, rows=5, planes=1, ranges=5)
    spectrum = scan(batch.r_true, SMALL, kind="music", count=batch.count, grid=grid)
    _, vectors = np.linalg.eigh(batch.r_true[0].numpy())
    noise = vectors[:, :-2]
    far = 1 / (1.05**3 * SMALL.range_max)
    place = torch.tensor([[0.0, 0.0, far]])
    a = lay_out_batch(batch, SMALL).steer(place)[0].numpy()
    expected = -math.log(np.square(np.abs(noise.conj().T @ a)).sum())
    assert spectrum.map[0, 2, 2].item() == pytest.approx(expected, rel=1e-4)


def test_chunks_do_not_change_the_map(draw_scenes, monkeypatch):
    """Less memory, the same numbers."""
    batch = draw_scenes(SMALL, sources=2, size=2)
    whole = scan_ceiling(batch.r_true, SMALL)
    monkeypatch.setattr("ris_model.estimate.spectra._CHUNK", 2 * 6 * 36 * 7)
    pieces = scan_ceiling(batch.r_true, SMALL)
    assert torch.allclose(whole.map, pieces.map, atol=1e-4)


def test_a_flat_spectrum_gives_few_peaks():
    """Two sources that are one give one peak, and no other is made up."""
    a = lay_out_batch_like(torch.tensor([[0.3, 0.1, 1.0]]))
    r = (a.mT @ a.conj())[None] * 36
    spectrum = scan(r, replace(SMALL), kind="music", count=torch.tensor([1]))
    assert spectrum.count.tolist() == [1]
    expected = name_places(torch.tensor([0.3, 0.1, 1.0]))
    assert torch.allclose(spectrum.points[0, 0], expected, atol=0.02)


def lay_out_batch_like(places: torch.Tensor) -> torch.Tensor:
    """Steering vectors of places."""
    from ris_model.geometry import place_elements, steer_places

    positions = place_elements(SMALL).float()
    return steer_places(positions, places, wavenumber=SMALL.wavenumber)[0]
