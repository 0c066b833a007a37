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
import nanhunt

folder, rank, guilty = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
batch = torch.zeros(3, 2) if str(rank) == guilty else torch.ones(3, 2)
try:
    with nanhunt.detect(model):
        (model(batch) - model.module.bias).abs().sqrt().sum().backward()
    print("silent")
except nanhunt.NonFiniteError as error:
    found = error.report.culprits[0]
    print(found.op, found.cause)
distributed.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("guilty", "expected"),
    [
        ("none", ["silent", "silent"]),
        (
            "1",
            [
                "c10d::allreduce_ received_from_another_rank",
                "aten::sqrt infinite_derivative_at_boundary",
            ],
        ),
    ],
)
def test_the_rank_that_made_the_value_is_told_from_the_one_that_received_it(
    tmp_path, guilty, expected
):
    """The same step on two ranks: both fail, and only one of them names an op of its own."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    ranks = [
        subprocess.Popen(
            [sys.executable, script, tmp_path, str(rank), guilty], stdout=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    assert [rank.communicate(timeout=120)[0].strip() for rank in ranks] == expected
