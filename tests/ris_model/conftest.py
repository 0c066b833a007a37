"""What several of the model's tests need."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """A busy machine makes two threads slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
