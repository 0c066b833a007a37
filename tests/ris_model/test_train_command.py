"""`ris-model train` and `generate` as a user runs them: killed, interrupted, in two processes."""

import io
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, replace

import pytest
import rich.console
import torch
from typer.testing import CliRunner

from ris_model.__main__ import app
from ris_model.checkpoint import LAST, Origin, load_checkpoint
from ris_model.commands.console import Console
from ris_model.commands.train import _watching_signals
from ris_model.subject import assemble, choose_config
from ris_model.training.feeds import draw_feeds
from ris_model.training.loop import Setting, Trainer
from ris_model.training.ranks import join_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = {"steps": 20, "epoch_scenes": 40, "validation_scenes": 16, "warmup": 5}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def invoke(*arguments: object):
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def launch(*arguments: object, ranks: int = 1) -> subprocess.Popen:
    """Start a command in a process of its own, or in several."""
    several = ("torch.distributed.run", "--standalone", "--nproc-per-node", ranks, "-m")
    module = ("-m", *(several if ranks > 1 else ()), "ris_model")
    return start(*module, *arguments)


def start(*arguments: object) -> subprocess.Popen:
    """Start Python, and listen to both of its outputs."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A file with a tiny configuration: 4 epochs of 5 steps."""
    tiny = choose_config("sound", "tiny")
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_text(json.dumps(asdict(replace(tiny, training=replace(tiny.training, **SHORT)))))
    return path


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory, one_thread):
    """The folder of a run that nobody cut."""
    out = tmp_path_factory.mktemp("whole")
    result = invoke("train", "--config", config, "--out", out)
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"Best val loss: \d+\.\d{6}", result.output.splitlines()[-1])
    return out


def wait_for(path, running: subprocess.Popen) -> None:
    """Until a file is there."""
    end = time.monotonic() + 60
    while not path.exists():
        assert running.poll() is None, running.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.01)


def assert_same_model(one, other):
    """The last parameters of two runs, to the bit."""
    first, second = (load_checkpoint(out / LAST) for out in (one, other))
    assert first.state == second.state
    for part in ("model", "average"):
        tensors, others = getattr(first, part), getattr(second, part)
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_killed_run_goes_on_from_its_last_checkpoint(config, whole, tmp_path):
    """As if nothing had been: nothing is lost but the steps since then."""
    running = launch("train", "--config", config, "--out", tmp_path)
    wait_for(tmp_path / LAST, running)
    running.send_signal(signal.SIGKILL)
    said = running.communicate(timeout=60)[0]
    assert running.returncode == -9, said
    assert load_checkpoint(tmp_path / LAST).state["counters"]["step"] < 20
    result = invoke("train", "--out", tmp_path, "--resume")
    assert result.exit_code == 0, result.output
    assert_same_model(tmp_path, whole)
    steps = [line.split(",")[1] for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    assert steps == ["step", *(str(n) for n in range(5, 21, 5))]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_run_that_is_told_to_stop_saves_first(config, whole, tmp_path, number, code):
    """At batch 7: saved one step later, and the rest is the same."""
    advance = Console.advance

    def interrupt(console, step):
        advance(console, step)
        if step == 7:
            signal.raise_signal(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Console, "advance", interrupt)
        result = invoke("train", "--config", config, "--out", tmp_path)
    assert result.exit_code == code
    assert "interrupted after batch 8; go on with" in result.output
    assert invoke("train", "--out", tmp_path, "--resume").exit_code == 0
    assert_same_model(tmp_path, whole)


@pytest.mark.parametrize("below", ["", "run"])
def test_a_file_is_no_folder(config, tmp_path, below):
    """Said before the first step."""
    (tmp_path / "file").write_text("mine")
    result = invoke("train", "--config", config, "--out", tmp_path / "file" / below)
    assert (result.exit_code, (tmp_path / "file").read_text()) == (2, "mine")
    assert "cannot be made a folder" in result.output
    assert "Epoch" not in result.output


def test_third_interrupt_does_not_wait():
    """Nor does it save; the handlers of before are back afterwards."""
    before = signal.getsignal(signal.SIGINT)
    with _watching_signals() as came:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert came == [signal.SIGINT] * 3
    assert signal.getsignal(signal.SIGINT) is before


def test_terminal_shows_the_time_left(monkeypatch):
    """A bar with batches and an estimate below the log; plain lines elsewhere."""
    texts = []
    for looked_at in (True, False):
        said = io.StringIO()
        terminal = rich.console.Console(file=said, force_terminal=looked_at, width=100)
        monkeypatch.setattr(
            "ris_model.commands.console.Terminal", lambda terminal=terminal, **_: terminal
        )
        console = Console(40, step=10)
        console.hear("[GRAD] [b]")
        console.advance(20)
        console.close()
        texts.append(said.getvalue())
    assert "20/40" in texts[0]
    assert "left" in texts[0]
    assert texts[1] == "[GRAD] [b]\n"


def test_two_processes_train_as_one(config, whole, tmp_path):
    """Half of every batch each: the same parameters within rounding, one log."""
    running = launch("train", "--config", config, "--out", tmp_path, ranks=2)
    said = running.communicate(timeout=120)[0]
    assert running.returncode == 0, said
    assert said.count("Best val loss") == said.count("Epoch 004/004") == 1
    one, two = (load_checkpoint(out / LAST) for out in (whole, tmp_path))
    assert two.state["counters"]["made"] == 20
    initial = load_initial()
    moved = torch.stack([(one.model[n] - initial[n]).norm() for n in initial]).norm()
    apart = torch.stack([(one.model[n] - two.model[n]).norm() for n in initial]).norm()
    assert moved > 0.1
    assert apart < 1e-2 * moved
    assert two.state["counters"]["best"] == pytest.approx(one.state["counters"]["best"], rel=1e-3)


def test_no_thread_outlives_the_training(config, tmp_path):
    """One of gloo that wakes up while Python finalizes would abort the process."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, pathlib\n"
        "from ris_model.__main__ import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "threads = pathlib.Path('/proc/self/task').glob('*/comm')\n"
        "print('left:', [t.read_text() for t in threads if 'gloo' in t.read_text()])\n"
    )
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    training = ("train", "--config", config, "--steps", 5, "--out", tmp_path / "out")
    said = start(*torchrun, script, *training).communicate(timeout=120)[0]
    assert said.count("left: []") == 2, said


def load_initial():
    """Parameters before the first step."""
    from ris_model.subject import sound

    return sound("tiny").model.state_dict()


def test_processes_skip_together(tmp_path):
    """One finds a non-finite loss, both drop the step, and their parameters stay equal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # forked: the packages are imported already
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=run_uneven, args=(r, several, tmp_path)) for r in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 on: of a fork beside threads
        for one in running:
            one.start()
    for one in running:
        one.join(timeout=120)
    assert [one.exitcode for one in running] == [0, 0]
    rows = [(tmp_path / str(rank)).read_text().split(";") for rank in range(2)]
    assert [row[:2] for row in rows] == [
        ["2", "another process skips"],
        ["2", "loss not finite"],
    ]
    assert rows[0][2] == rows[1][2]


def run_uneven(rank, several, out):
    """Train one of two processes; rank 1 finds at batch 1 a loss of inf with sound gradients."""
    os.environ.update({**several, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    config = choose_config("sound", "tiny")
    config = replace(config, training=replace(config.training, steps=3, validation_scenes=16))
    subject = assemble(config, "sound", seed=0)

    def loss_fn(model, batch):
        terms = subject.loss_fn(model, batch)
        if trainer.at.step == rank == 1 and model.training:
            terms["odd"] = torch.tensor(float("inf"))
        return terms

    with join_ranks("cpu") as ranks:
        setting = Setting(
            subject=replace(subject, loss_fn=loss_fn),
            origin=Origin(config, "sound", 0, "off"),
            ranks=ranks,
            feeds=draw_feeds(config, seed=0, ranks=ranks),
        )
        trainer = Trainer(setting)
        trainer.run()
    total = sum(float(p.detach().double().sum()) for p in subject.model.parameters())
    (out / str(rank)).write_text(f"{trainer.at.made};{trainer.reason};{total}")


def test_run_that_only_skips_names_what_to_run_next(tmp_path):
    """Exit code 1, no `Best val loss: inf`."""
    arguments = ("--preset", "tiny", "--profile", "incident", "--batch", 2, "--seed", 1)
    result = invoke("train", "--out", tmp_path, *arguments)
    assert result.exit_code == 1
    assert result.stderr == (
        "ris-model: the first 30 steps were all skipped (gradients not finite): nothing was "
        "learnt; find the operation with: nanhunt replay ris:incident --set preset=tiny "
        "--set batch_size=2 --set amp=off --seed 1\n"
    )
    assert "inf" not in result.stdout
    assert not list(tmp_path.glob("*.safetensors"))


def test_wrong_options_are_one_sentence(config, whole, tmp_path):
    """Exit code 2, no traceback, nothing written."""
    resumed = ("--out", whole, "--resume")
    for arguments, sentence in (
        (("--out", whole, "--preset", "tiny"), "holds a run already; give --resume"),
        ((*resumed, "--batch", 16), "was begun with --batch 8, not 16; leave it out"),
        ((*resumed, "--amp", "bf16"), "was begun with --amp off, not bf16; leave it out"),
        (("--out", tmp_path, "--resume"), "there is no checkpoint"),
        (("--out", tmp_path, "--preset", "huge"), "there is no preset 'huge'"),
        (("--out", tmp_path, "--profile", "x"), "there is no profile 'x'"),
        (("--out", tmp_path, "--amp", "fp8"), "amp='fp8' is not known"),
        (("--out", tmp_path, "--steps", 0), "steps is 0; give a whole number from 1 to "),
        (("--out", tmp_path, "--device", "tpu"), "there is no device 'tpu'"),
        (("--out", tmp_path, "--data", tmp_path), "there is no shard of the split 'train'"),
        (("--out", tmp_path, "--config", tmp_path / "no.json"), "No such file or directory"),
        (("--out", tmp_path, "--config", config, "--preset", "tiny"), "--config or --preset"),
        (("--out", tmp_path, "--seed", -1), "seed is -1; give a whole number from 0"),
    ):
        result = invoke("train", *arguments)
        assert result.exit_code == 2, arguments
        assert sentence in result.stderr
        assert result.stderr.startswith("ris-model: ")
        assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_run_without_tensorboard_says_so(config, tmp_path, monkeypatch):
    """The metrics are in the table all the same."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = invoke("train", "--config", config, "--out", tmp_path)
    assert result.exit_code == 0
    assert result.output.startswith("TensorBoard is not installed: metrics go to metrics.csv")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best.safetensors",
        "last.safetensors",
        "metrics.csv",
    ]


def test_generate_writes_keeps_and_feeds(tmp_path):
    """Twice the same command, then a training from the shards."""
    shards = tmp_path / "shards"
    arguments = ("generate", "--preset", "tiny", "--out", shards, "--scenes", 48)
    sizes = ("--shard-size", 32)
    assert invoke(*arguments, *sizes).output.splitlines()[-1].endswith("2 shards written, 0 kept")
    assert invoke(*arguments, *sizes).output.splitlines()[-1].endswith("0 shards written, 2 kept")
    out = tmp_path / "run"
    trained = invoke(
        "train", "--preset", "tiny", "--steps", 4, "--data", shards, "--out", out, "--curriculum"
    )
    assert trained.exit_code == 0, trained.output
    assert "[joint]" in trained.output
    assert load_checkpoint(out / LAST).origin.data == str(shards)
    refused = invoke(*arguments, *sizes, "--seed", 1)
    assert refused.exit_code == 2
    assert "train-00000.safetensors is a foreign shard: its seed is 0, not 1" in refused.stderr
    for options, sentence in (
        (("--split", "dev"), "there is no split 'dev'; choose one of train, val, test"),
        (("--shard-size", 0), "shard-size is 0; give a whole number from 1 to "),
    ):
        wrong = invoke(*arguments, *options)
        assert (wrong.exit_code, sentence in wrong.stderr) == (2, True)
