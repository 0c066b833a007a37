"""Metrics: hand-made scenes whose figures can be told in the head."""

import math

import numpy as np
import pytest
import torch

from ris_model.metrics import join, measure_gospa, score, split_by_snr, summarise

DEG = math.pi / 180


def judge(truth: list, found: list, snr: float = 5.0):
    """Score one scene of points in degrees, degrees, metres."""
    scale = torch.tensor([DEG, DEG, 1.0], dtype=torch.float64)

    def pad(points):
        empty = [[0.0, 0.0, 1.0]] * (3 - len(points))
        return (torch.tensor(points + empty, dtype=torch.float64) * scale)[None]

    return score(
        pad(truth),
        pad(found),
        count=torch.tensor([len(truth)]),
        found_count=torch.tensor([len(found)]),
        snr_db=torch.tensor([snr]),
    )


def test_order_does_not_matter():
    """Sources are matched at the least cost, whichever slot they are in."""
    scores = judge([[10, 0, 1], [-20, 5, 2]], [[-21, 5, 2], [10, 0.5, 1.25]])
    expected = [[0, 0.5 * DEG, 0.25], [DEG, 0, 0]]
    assert np.allclose(scores.errors[0, :2], expected)
    assert np.isnan(scores.errors[0, 2]).all()
    assert (scores.misses, scores.alarms) == (0, 0)
    assert scores.success.all()
    assert scores.rmspe[0] == pytest.approx(DEG * math.sqrt((1 + 0.25) / 4))


def test_missing_and_surplus_sources_are_counted():
    """Fewer or more than there are."""
    missed = judge([[10, 0, 1], [-20, 5, 2]], [[10, 0, 1]])
    assert (missed.misses, missed.alarms, missed.right) == (1, 0, False)
    surplus = judge([[10, 0, 1]], [[10, 0, 1], [-20, 5, 2]])
    assert (surplus.misses, surplus.alarms, surplus.right) == (0, 1, False)
    assert not surplus.success.any()


def test_a_far_pair_is_an_outlier_a_miss_and_a_false_alarm():
    """Its raw error is kept."""
    far = judge([[10, 0, 1]], [[30, 0, 1]])
    assert far.errors[0, 0, 0] == pytest.approx(20 * DEG)
    assert (far.misses, far.alarms, far.outlier) == (1, 1, True)
    wrong_range = judge([[10, 0, 1]], [[10, 0, 2.5]])
    assert (wrong_range.misses, wrong_range.outlier, wrong_range.success) == (1, False, False)


def test_azimuths_are_wrapped():
    """179 and -179 degrees are 2 degrees apart."""
    assert judge([[179, 0, 1]], [[-179, 0, 1]]).errors[0, 0, 0] == pytest.approx(2 * DEG)


def test_gospa_is_a_distance_in_space():
    """Near pairs by their distance, single ones by half the squared cut-off, far ones by it all."""
    a, b = np.array([[0.0, 0.0, 1.0]]), np.array([[0.0, 0.0, 1.3]])
    assert measure_gospa(a, b) == pytest.approx(0.3)
    assert measure_gospa(a, np.zeros((0, 3))) == pytest.approx(math.sqrt(0.5))
    assert measure_gospa(a, np.array([[0.0, 0.0, 9.0]])) == pytest.approx(1.0)
    assert measure_gospa(a, np.concatenate((a, b))) == pytest.approx(math.sqrt(0.5))


def test_summary_of_joined_scenes():
    """Medians over sources, rates over scenes and sources."""
    parts = [
        judge([[10, 0, 1]], [[11, 0, 1]], snr=0.0),
        judge([[10, 0, 1]], [[13.5, 0, 1]], snr=10.0),
        judge([[10, 0, 1], [40, 0, 1]], [[50, 0, 1]], snr=11.0),
    ]
    scores = join(parts)
    figures = summarise(scores)
    assert figures.median[0] == pytest.approx(3.5 * DEG)
    assert (figures.scenes, figures.misses, figures.alarms) == (3, 0.5, 0.25)
    assert figures.right == pytest.approx(2 / 3)
    assert figures.outliers == pytest.approx(1 / 3)
    assert figures.success == pytest.approx(1 / 3)
    bins = split_by_snr(scores)
    assert {name: len(part.count) for name, part in bins.items()} == {
        "<= 0 dB": 1,
        "0 to 10 dB": 1,
        "> 10 dB": 1,
    }


def test_nothing_found_is_said_as_nan():
    """No pair, no median; the rates stand."""
    figures = summarise(judge([[10, 0, 1]], []))
    assert math.isnan(figures.median[0])
    assert math.isnan(figures.rmspe)
    assert (figures.misses, figures.success) == (1.0, 0.0)
