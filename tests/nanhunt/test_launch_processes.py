"""nanhunt run in processes of its own: workers, forks, ranks, and the project's own trainer."""

import os
import re
import subprocess
import sys

import pytest

from nanhunt import store

NET = """
import os, sys
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)
    def forward(self, x, bad=False):
        h = self.norm(self.body(x))
        return self.head((h * 0).sqrt() if bad else h).mean()  # planted
"""
WORKERS = """
import hashlib, threading
from torch.utils.data import DataLoader, TensorDataset
from net import *
def train(context=None, bad=()):
    net = Net()
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    data = TensorDataset(torch.randn(32, 4))
    workers = {"num_workers": 1 + (context == "fork"), "multiprocessing_context": context}
    for i, (x,) in enumerate(DataLoader(data, 8, **(workers if context else {}))):
        sgd.zero_grad()
        net(x, i in bad).backward()
        sgd.step()
    values = b"".join(t.numpy().tobytes() for t in net.state_dict().values())
    print(context, hashlib.sha256(values).hexdigest(), flush=True)
if __name__ == "__main__":
    torch.manual_seed(0)
    print(__name__, torch.get_num_threads(), flush=True)
    train("fork")
    train("spawn")
    child = os.fork()
    if not child:
        train(bad=(1, 2))  # nobody watches here
        sys.exit(4)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    if "fail" in sys.argv:
        train("fork", bad=(1, 3))
"""
RANKS = """
from net import *
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
torch.manual_seed(0)
net = DistributedDataParallel(Net())
sgd = torch.optim.SGD(net.parameters(), 0.1)
for i in range(4):
    sgd.zero_grad()
    net(torch.randn(6, 4), dist.get_rank() == 1 and i in (1, 3)).backward()
    sgd.step()
"""
SHARDS = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
dist.init_process_group("gloo")
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
fully_shard(net[0])  # its gradients are sent within a Function of its own
fully_shard(net)
sgd = torch.optim.SGD(net.parameters(), 0.1)
torch.manual_seed(dist.get_rank())
for i in range(5):
    sgd.zero_grad()
    y = net(torch.randn(6, 4))
    bad = sys.argv[1] if dist.get_rank() == 1 and i in (1, 3) else ""
    loss = ((y * 0).sqrt() if bad == "backward" else y / 0 if bad == "loss" else y).sum()
    loss.backward()
    if bad == "part":  # of the gradients of this rank only
        net[0].weight.grad.to_local()[0] -= torch.inf
    sgd.step()
whole = [p.full_tensor().isfinite().all().item() for p in net.parameters()]
print("all finite", all(whole), flush=True)
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
CLOSING = re.compile("nanhunt: watched .*\n")


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Everything that these tests look at, run at the same time: code, stdout and stderr."""
    place = tmp_path_factory.mktemp("trainings")
    scripts = {"net": NET, "workers": WORKERS, "ranks": RANKS, "shards": SHARDS}
    for name, text in scripts.items():
        (place / f"{name}.py").write_text(text)
    python, run = [sys.executable], [sys.executable, "-m", "nanhunt", "run"]
    torchrun = [*python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ranks = [*torchrun, *run[1:]]
    train = ["-m", "ris_model", "train", "--preset", "tiny", "--steps", "3"]
    commands = {
        "alone": [*python, "workers.py"],
        "full": [*run, "--mode", "full", "workers.py"],
        "failing": [*run, "workers.py", "fail"],
        "ranks": [*ranks, "ranks.py"],
        "backward": [*ranks, "--mode", "full", "--out", "full", "shards.py", "backward"],
        "loss": [*ranks, "--out", "loss", "shards.py", "loss"],
        "part": [*ranks, "--keep-going", "--out", "part", "shards.py", "part"],
        "sound": [*run, *train, "--out", "sound"],
        "incident": [*run, "--out", "found", *train, "--out", "inc", "--profile", "incident"],
        "both": [*ranks, "--out", "both", *train, "--out", "inc2", "--profile", "incident"],
    }
    options = {"cwd": place, "env": ENVIRONMENT, "text": True}
    pipes = dict.fromkeys(["stdout", "stderr"], subprocess.PIPE)
    started = {name: subprocess.Popen(c, **pipes, **options) for name, c in commands.items()}
    ended = {name: (process.communicate(timeout=300), process) for name, process in started.items()}
    return place, {name: (p.returncode, out, err) for name, ((out, err), p) in ended.items()}


def test_workers_forks_and_threads(ends):
    """They compute what they compute alone, and only this process is spoken of."""
    _, runs = ends
    code, out, err = runs["full"]
    alone = runs["alone"]
    assert (code, out) == alone[:2]
    assert out.startswith("__main__ 1\nfork ")
    assert CLOSING.sub("", err) == alone[2]
    assert err.count("nanhunt: watched 12 optimizer steps of 3 optimizers (3 SGD)") == 1


def test_a_failing_program(ends):
    """The report is there, and the exit code is 1."""
    place, runs = ends
    code, out, err = runs["failing"]
    assert code == 1
    assert out == runs["alone"][1]  # and no more: the last training did not come to its end
    assert "nanhunt: optimizer step 14 of SGD was withheld: 4 of 6 gradients are not finite" in err
    assert "nanhunt: culprit at optimizer step 16 (a failure was first met at step 14, " in err
    report = store.load(place / "nanhunt-out" / "workers-1.json")
    assert (report.culprits[0].file, report.culprits[0].op) == ("net.py", "aten::sqrt")
    assert "Traceback" not in err


def states_of(path):
    """The report of all ranks, and the state of each."""
    report = store.load(path)
    return report, [row.state for row in report.ranks]


def test_copies_tell_one_report(ends):
    """It is that of the rank that holds the birth, and both have withheld the same steps."""
    place, runs = ends
    code, _, err = runs["ranks"]
    assert code == 1
    assert [path.name for path in (place / "nanhunt-out").glob("ranks*")] == ["ranks-1.json"]
    report, states = states_of(place / "nanhunt-out" / "ranks-1.json")
    assert (report.rank, states) == (1, ["received", "culprit"])
    assert (report.culprits[0].op, report.culprits[0].source) == (
        "aten::sqrt",
        "return self.head((h * 0).sqrt() if bad else h).mean()  # planted",
    )
    assert err.count(": culprit at optimizer step 4 ") == 1
    for rank in (0, 1):
        assert f"nanhunt, rank {rank}: optimizer step 2 of SGD was withheld" in err


def test_shards_tell_one_report(ends):
    """What all received of one rank, and a loss that keeps the others waiting in their backward."""
    place, runs = ends
    assert [runs[name][0] for name in ("backward", "loss")] == [1, 1]
    report, states = states_of(place / "full" / "shards-1.json")
    assert (report.culprits[0].op, states) == ("aten::sqrt", ["received", "culprit"])
    report, states = states_of(place / "loss" / "shards-1.json")
    assert (report.culprits[0].op, states) == ("aten::div", ["finite", "culprit"])


def test_shards_withhold_together(ends):
    """Also where the gradients of one rank alone are bad."""
    place, runs = ends
    _, out, err = runs["part"]
    assert out.count("all finite True") == 2
    for step in (2, 4):
        told = f"optimizer step {step} of SGD was withheld"
        assert f"nanhunt, rank 0: {told}: gradients of another rank are not finite" in err
        assert f"nanhunt, rank 1: {told}: 1 of 4 gradients are not finite" in err
    assert states_of(place / "part" / "shards-1.json")[1] == ["finite", "culprit"]


def test_the_trainer_of_the_project(ends):
    """Unmodified: the sound profile passes, the incident's line is named though it skips itself."""
    place, runs = ends
    code, _, err = runs["sound"]
    assert code == 0
    assert "nanhunt: watched 3 optimizer steps of 1 optimizer (AdamW) · nothing non-finite" in err
    code, _, err = runs["incident"]
    assert code == 1
    assert "was left out by the program, or ran compiled: " in err
    culprit = store.load(place / "found" / "ris_model-1.json").culprits[0]
    assert (culprit.op, culprit.cause) == ("aten::_linalg_eigh", "degenerate_decomposition")
    assert culprit.file.endswith("ris_model/losses/incident.py")
    assert runs["both"][0] == 1
    report, states = states_of(place / "both" / "ris_model-1.json")
    assert (report.culprits[0].op, states) == ("aten::_linalg_eigh", ["culprit", "culprit"])
