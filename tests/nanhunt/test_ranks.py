"""Values that come from another rank: who made them, and who only received them."""

import subprocess
import sys

import pytest
from torch import distributed

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="needs gloo"
)

# One step of a model in two processes; the rank that is guilty meets the root of 0.
TRAIN = """
import sys
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
import nanhunt

folder, rank, guilty, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Linear(2, 2, bias=False)
model = fully_shard(model) if kind == "shards" else nn.parallel.DistributedDataParallel(model)
batch = torch.zeros(3, 2) if str(rank) == guilty else torch.ones(3, 2)
try:
    with nanhunt.detect(model):
        model(batch).abs().sqrt().sum().backward()
    print("silent")
except nanhunt.NonFiniteError as error:
    found = error.report.culprits[0]
    print(found.op, found.cause)
distributed.destroy_process_group()
"""


RECEIVED = "received_from_another_rank"


@pytest.mark.parametrize(
    ("kind", "guilty", "received"),
    [
        ("copies", "none", None),
        ("copies", "1", f"c10d::allreduce_ {RECEIVED}"),
        ("shards", "none", None),
        ("shards", "1", f"c10d::_reduce_scatter_base_ {RECEIVED}"),
    ],
)
def test_the_rank_that_made_the_value_is_told_from_the_one_that_received_it(
    tmp_path, kind, guilty, received
):
    """The same step on two ranks: both fail, and only one of them names an op of its own."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    ranks = [
        subprocess.Popen(
            [sys.executable, script, tmp_path, str(rank), guilty, kind],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    made = "aten::sqrt infinite_derivative_at_boundary"
    said = [rank.communicate(timeout=120)[0].strip() for rank in ranks]
    assert said == ([received, made] if received else ["silent", "silent"])
