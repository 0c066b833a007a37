"""Where the random generators stand."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from nanhunt.errors import SubjectError
from nanhunt.generators import read_generators, set_generators
from nanhunt.replay import replay
from nanhunt.subject import Subject


def draw():
    """One number of each generator."""
    return random.random(), np.random.rand(), torch.rand(3).tolist()  # noqa: NPY002, S311


def test_generators_go_back_to_where_they_stood():
    """All three of them draw the same numbers again."""
    stood = read_generators()
    drawn = draw()
    assert draw() != drawn
    set_generators(stood)
    assert draw() == drawn


@pytest.mark.parametrize("name", ["rand", "randn", "randint", "permutation"])
def test_each_state_of_numpy_is_told_from_the_next(name):
    """Also where a normal number is held back, which does not move the generator itself."""
    draws = [lambda: getattr(np.random, name)(7), np.random.randn, np.random.rand]
    for index in range(30):
        stood = read_generators()
        assert str(stood.numbers) == str(np.random.get_state())  # noqa: NPY002
        first = [str(work()) for work in draws[: 1 + index % 3]]
        set_generators(stood)
        assert [str(work()) for work in draws[: 1 + index % 3]] == first


def test_another_generator_of_numpy():
    """One that is no Mersenne twister is asked each time."""
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(3))
        stood = read_generators()
        drawn = np.random.rand()  # noqa: NPY002
        assert np.random.rand() != drawn  # noqa: NPY002
        set_generators(stood)
        assert np.random.rand() == drawn  # noqa: NPY002
    finally:
        np.random.set_bit_generator(before)


def noisy_subject(**changes):
    """A step whose loss is what the generators give."""
    model = nn.Linear(3, 1)
    return Subject(
        model, [torch.ones(4, 3)], lambda m, x: (m(x) * torch.rand(4, 1)).sum(), **changes
    )


def test_replay_starts_where_the_generators_of_the_subject_stand():
    """And not at its seed."""
    stood = read_generators()
    expected = torch.rand(4, 1)
    subject = noisy_subject(generators=stood)
    loss = (subject.model(torch.ones(4, 3)) * expected).sum()
    assert replay(subject, subject.batch(0)).run.loss == loss.item()
    assert replay(noisy_subject(seed=1), torch.ones(4, 3)).run.loss != loss.item()


def test_other_steps_do_not_start_there():
    """They belong to one step."""
    subject = noisy_subject(generators=read_generators(), step=3)
    assert subject.at(3).generators is subject.generators
    assert subject.at(4).generators is None


def test_generators_of_another_kind_are_refused():
    """With the name of what gives them."""
    with pytest.raises(
        SubjectError, match=r"read_generators\(\) returns; got an object of type int"
    ):
        Subject.of(noisy_subject(generators=5))
