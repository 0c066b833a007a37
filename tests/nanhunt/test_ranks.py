"""Values that come from another rank: who made them, and who only received them."""

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed, nn

import nanhunt

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="needs gloo"
)


def train(rank, folder, guilty):
    """One step of a model in two processes; the rank that is guilty meets the root of 0."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    batch = torch.zeros(3, 2) if rank == guilty else torch.ones(3, 2)
    try:
        with nanhunt.detect(model):
            (model(batch) - model.module.bias).abs().sqrt().sum().backward()
        told = "silent"
    except nanhunt.NonFiniteError as error:
        found = error.report.culprits[0]
        told = f"{found.op} {found.cause}"
    (folder / f"rank{rank}").write_text(told)
    distributed.destroy_process_group()


@pytest.mark.parametrize("guilty", [None, 1])
def test_the_rank_that_made_the_value_is_told_from_the_one_that_received_it(tmp_path, guilty):
    """The same step on two ranks: both fail, and only one of them names an op of its own."""
    mp.spawn(train, args=(tmp_path, guilty), nprocs=2)
    told = [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)]
    assert told == (
        ["silent", "silent"]
        if guilty is None
        else [
            "c10d::allreduce_ received_from_another_rank",
            "aten::sqrt infinite_derivative_at_boundary",
        ]
    )
