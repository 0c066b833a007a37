"""What several of the model's tests need."""

from dataclasses import fields, replace

import pytest
import torch

from ris_model.data import Batch, draw_batch


@pytest.fixture(scope="module")
def one_thread():
    """A busy machine makes two threads slower than one, and two round sums otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def draw_scenes():
    """Draw scenes that all have the same number of sources."""

    def draw(scenario, *, sources: int, size: int, **changes: object) -> Batch:
        world = replace(scenario, sources=max(sources, 2), **changes)
        enough = 3 * world.sources * size // 2 + 40
        drawn = draw_batch(world, seed=11, split="test", index=sources, size=enough)
        chosen = (drawn.count == sources).nonzero()[:size, 0]
        return Batch(**{f.name: getattr(drawn, f.name)[chosen] for f in fields(drawn)})

    return draw
