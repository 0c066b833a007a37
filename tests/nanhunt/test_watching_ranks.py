"""`watch` among several processes: all skip, all tell the same report, none waits for the dead."""

import json
import subprocess
import sys

import pytest
from torch import distributed

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="needs gloo"
)

# Four steps in two processes; in the third, the guilty one's batch has a root of 0. Each prints
# what it was told, and the sum of its parameters.
TRAIN = """
import json, os, sys
import torch
from torch import distributed, nn
import nanhunt
from nanhunt.watching import ranks

folder, rank, kind, guilty = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
if kind == "shards":
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
else:
    model = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
told = []
watch = nanhunt.watch(model, optimizer, clip=1.0, on_report=told.append)
if kind == "dead":
    ranks.PATIENCE = 4.0
    if str(rank) == guilty:
        ranks.Ranks.merge = lambda *_: os._exit(9)
outcomes = []
torch.manual_seed(rank)
for step in range(4):
    batch, weight = torch.randn(3, 4), torch.ones(3, 1)
    bad = str(rank) in guilty and step == 2
    if bad and kind != "difference":
        weight[1] = 0
    closure = lambda: (model(batch).square() * weight).sum(-1).sqrt().sum() + (
        torch.log(-batch.square().sum() - 1) if bad and kind == "difference" else 0
    )
    if kind == "plain":
        optimizer.zero_grad()
        closure().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        continue
    outcomes.append(watch.step(closure))
    if kind == "dead" and step == 2:
        break
report = next((o.report for o in outcomes if o.report), None)
whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
print(json.dumps({
    "stepped": [o.stepped for o in outcomes],
    "report": report and [report.rank, report.culprits[0].op if report.culprits else None],
    "ranks": report and [row.state for row in report.ranks],
    "told": len(told),
    "norms": [sum(o.norms.values()) for o in outcomes if o.stepped],
    "sums": [float(p.detach().double().sum()) for p in whole],
}))
if kind != "dead":
    distributed.destroy_process_group()
else:
    os._exit(0)
"""


def train(folder, kind, guilty):
    """What both processes print, the second one's nothing if it died."""
    folder.mkdir()
    script = folder / "train.py"
    script.write_text(TRAIN)
    both = [
        subprocess.Popen(
            [sys.executable, script, folder, str(rank), kind, guilty],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=180)[0].strip() for process in both]
    return [json.loads(text) if text else None for text in said]


@pytest.mark.parametrize(("kind", "other"), [("copies", "finite"), ("shards", "received")])
def test_all_skip_and_tell_which_rank_made_the_value(tmp_path, kind, other):
    """With DistributedDataParallel and with fully_shard; afterwards they train on together."""
    first, second = train(tmp_path / "run", kind, "1")
    for told in (first, second):
        assert told["stepped"] == [True, True, False, True]
        assert told["report"] == [1, "aten::sqrt"]
        assert told["ranks"] == [other, "culprit"]
    assert [first["told"], second["told"]] == [1, 0]
    assert first["sums"] == second["sums"]
    assert first["norms"] == second["norms"]


@pytest.mark.parametrize("guilty", ["0", "1", "01"])
def test_they_stay_together_where_precision_is_a_question(tmp_path, guilty):
    """No replay is made in another dtype: parameters would lose the hooks of the wrapper."""
    first, second = train(tmp_path / "run", "difference", guilty)
    for told in (first, second):
        assert told["stepped"] == [True, True, False, True]
        assert told["report"] == [int(guilty[0]), "aten::log"]
    assert first["sums"] == second["sums"]


def test_watched_copies_train_to_the_same_bits(tmp_path):
    """As the plain loop does that clips."""
    plain = train(tmp_path / "plain", "plain", "none")
    watched = train(tmp_path / "watched", "copies", "none")
    assert [one["sums"] for one in plain] == [one["sums"] for one in watched]
    assert watched[0]["stepped"] == [True] * 4


def test_a_rank_that_dies_does_not_take_the_report_along(tmp_path):
    """The report says whom it lacks."""
    first, second = train(tmp_path / "run", "dead", "1")
    assert second is None
    assert first["ranks"] == ["finite", "missing"]
    assert first["told"] == 1
