"""Whether two views of one storage have an element in common."""

import random

import pytest
import torch

from nanhunt.recorder.regions import region_of

BASE = torch.zeros(6, 8)
VIEWS = {
    "all": BASE,
    "row": BASE[2],
    "column": BASE[:, 3],
    "other column": BASE[:, 4],
    "even": BASE.view(-1)[::2],
    "odd": BASE.view(-1)[1::2],
    "block": BASE[1:3, 2:5],
    "transposed": BASE.t()[3:5],
    "expanded": BASE[:1, :1].expand(4, 4),
    "empty": BASE[:0],
    "scalar": BASE[5, 7],
}


def elements(view):
    """The elements that a view looks at, found by writing to them."""
    BASE.zero_()
    view.fill_(1) if 0 not in view.stride() else view[:1, :1].fill_(1)
    return set(BASE.view(-1).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("one", VIEWS)
@pytest.mark.parametrize("other", VIEWS)
def test_meets_as_writing_shows(one, other):
    """Two regions meet exactly when a write through one is seen through the other."""
    expected = bool(elements(VIEWS[one]) & elements(VIEWS[other]))
    assert region_of(VIEWS[one]).meets(region_of(VIEWS[other])) == expected


def test_random_slices():
    """The same on random strided slices, in both orders, and what is within is known to meet."""
    rng = random.Random(0)  # noqa: S311 - a test's own draws
    for _ in range(200):
        views = [
            BASE[rng.randrange(5) :: rng.randint(1, 3), rng.randrange(7) :: rng.randint(1, 3)]
            for _ in range(2)
        ]
        one, other = map(region_of, views)
        expected = bool(elements(views[0]) & elements(views[1]))
        assert one.meets(other) == other.meets(one) == expected
        if one.is_within(other):
            assert elements(views[0]) <= elements(views[1])


def test_large_storages_cost_nothing():
    """Two interleaved views of a large storage are told apart without touching its memory."""
    base = torch.empty(1 << 26)
    assert not region_of(base[::2]).meets(region_of(base[1::2]))
    assert region_of(base[::2]).meets(region_of(base[::4]))
