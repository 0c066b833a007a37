"""Loop: whole trainings; cut and resumed, stalled, curricula, what is said and written."""

import csv
import math
import warnings
from dataclasses import replace

import pytest
import torch

from ris_model.checkpoint import BEST, LAST, Origin, load_checkpoint, load_model
from ris_model.config import PRESETS, SPLITS, Config, CovarianceForm, Training
from ris_model.data import draw_batch
from ris_model.shards import Plan, write_shards
from ris_model.subject import assemble, choose_config
from ris_model.training.averaging import average
from ris_model.training.feeds import draw_feeds, read_feeds
from ris_model.training.journal import Board, Deaf, Table
from ris_model.training.loop import Setting, StalledError, Trainer
from ris_model.training.ranks import Ranks, join_ranks
from ris_model.training.schedule import CURRICULUM, PLAIN, choose_phase, plan_blend
from ris_model.training.validation import validate

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = {"steps": 12, "epoch_scenes": 40, "validation_scenes": 16, "warmup": 2}


class Memory(Deaf):
    """Keeps what it is told."""

    def __init__(self):
        self.lines, self.epochs, self.steps = [], [], []

    def hear(self, line):
        self.lines.append(line)

    def note(self, epoch):
        self.epochs.append(epoch)

    def advance(self, step):
        self.steps.append(step)


def configure(profile: str = "sound", **training) -> Config:
    """A tiny configuration: epochs of 5 batches of 8."""
    config = choose_config(profile, "tiny")
    return replace(config, training=replace(config.training, **{**SHORT, **training}))


def start(out=None, *, profile="sound", amp="off", data=None, setting=None, **training) -> Trainer:
    """A trainer of a tiny run."""
    config = configure(profile, **training)
    ranks = Ranks()
    feeds = (
        draw_feeds(config, seed=0, ranks=ranks)
        if data is None
        else read_feeds(config, data, seed=0, ranks=ranks)
    )
    options = {"origin": Origin(config, profile, 0, amp), "feeds": feeds, "out": out}
    subject = assemble(config, profile, seed=0, amp=amp)
    return Trainer(Setting(subject=subject, **{**options, **(setting or {})}))


def stop_after(steps: int):
    """A question that is answered with yes from some step on."""
    asked = []
    return lambda: bool(asked.append(0)) or len(asked) >= steps


def same(one, other) -> bool:
    """Equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize(
    ("profile", "amp", "cut"),
    [("sound", "off", 10), ("sound", "fp16", 7)],
)
def test_cut_run_ends_in_the_same_bits(tmp_path, profile, amp, cut):
    """In mid-epoch and at an epoch's end; parameters, average, optimizer, counters, best."""
    options = {"profile": profile, "amp": amp}
    whole = start(tmp_path / "whole", **options)
    assert whole.run() == "finished"
    first = start(tmp_path / "cut", **options, setting={"interrupted": stop_after(cut)})
    assert first.run() == "interrupted"
    assert first.at.step == cut
    torch.manual_seed(999)
    second = start(tmp_path / "cut", **options)
    second.resume(tmp_path / "cut" / LAST)
    assert second.run() == "finished"
    for name in (LAST, BEST):
        one, other = (load_checkpoint(tmp_path / run / name) for run in ("whole", "cut"))
        assert same(one.model, other.model)
        assert same(one.average, other.average)
        assert all(
            same(one.optimizer["state"][i], other.optimizer["state"][i])
            for i in one.optimizer["state"]
        )
        assert one.state == other.state
        assert one.origin == other.origin


def test_dropout_is_the_same_after_a_cut(tmp_path):
    """The incident's network drops at random; with its fatal term out it trains."""
    ends = []
    for cut in (None, 4):
        trainer = start(tmp_path / str(cut), profile="incident", steps=8)
        trainer.setting.subject.reweight("lam_align", 0.0)
        trainer.configured["lam_align"] = 0.0
        if cut:
            other = start(
                tmp_path / "4", profile="incident", steps=8, setting={"interrupted": stop_after(4)}
            )
            other.configured["lam_align"] = 0.0
            assert other.run() == "interrupted"
            trainer.resume(tmp_path / "4" / LAST)
        trainer.run()
        assert trainer.at.made == 8
        ends.append(trainer.setting.subject.model.state_dict())
    assert same(*ends)


def test_log_lines_and_metrics(tmp_path):
    """The first batch, each epoch; a row per epoch."""
    memory = Memory()
    table = Table(tmp_path / "metrics.csv", step=0)
    trainer = start(tmp_path, setting={"listeners": (memory, table)})
    trainer.run()
    assert memory.steps == list(range(1, 13))
    assert memory.lines[1].startswith("[DEBUG] Loss is finite: 8.829")
    assert memory.lines[2].startswith("[GRAD] backbone=3.")
    assert memory.lines[3] == "[LR] epoch=001 groups=2 lr=1.596e-03,1.596e-03"
    assert memory.lines[4] == "[OPT] step 5 / batch 5"
    assert memory.lines[5] == (
        f"Epoch 001/003 [no-curriculum] train {memory.epochs[0].train:.6f}  "
        f"val {memory.epochs[0].val:.6f}  (lam_cross=0.0025 lam_gap=0.012 lam_K=0.5)"
    )
    assert len(memory.lines) == 3 + 3 * 3
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["5", "10", "12"]
    assert [float(row["val"]) for row in rows] == [epoch.val for epoch in memory.epochs]
    assert trainer.at.best == min(epoch.val for epoch in memory.epochs)
    assert math.fsum(memory.epochs[0].terms.values()) == pytest.approx(memory.epochs[0].val)
    # a run that goes on from step 10 writes its row of step 12 once
    again = Table(tmp_path / "metrics.csv", step=10)
    again.note(memory.epochs[2])
    with (tmp_path / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["5", "10", "12"]


def test_tensorboard_gets_the_metrics(tmp_path):
    """Event files that can be read back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own dependencies
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board, memory = Board(tmp_path, step=0), Memory()
        start(setting={"listeners": (board, memory)}).run()
        board.close()
        events = EventAccumulator(str(tmp_path)).Reload()
    values = [(event.step, event.value) for event in events.Scalars("val")]
    assert values == [(e.step, pytest.approx(e.val)) for e in memory.epochs]


def test_skipped_steps_change_nothing_and_are_told():
    """Parameters, average, schedule; the loss of the epoch is that of the steps made."""
    memory = Memory()
    trainer = start(setting={"listeners": (memory,)}, steps=5)
    draw = trainer.setting.feeds.train

    def spoil(step):
        batch = draw(step)
        return replace(batch, r_true=batch.r_true * math.nan) if step == 2 else batch

    trainer.setting = replace(trainer.setting, feeds=replace(trainer.setting.feeds, train=spoil))
    assert trainer.run() == "finished"
    assert "[STEP] Loss not finite, skipping step and zeroing grads" in memory.lines
    assert (trainer.at.made, memory.epochs[0].skipped) == (4, 1)
    assert trainer.setting.subject.scheduler.last_epoch == 4
    assert math.isfinite(memory.epochs[0].train)
    assert int(trainer.average.n_averaged) == 4


def test_run_that_only_skips_is_stopped():
    """The case report's system: an error that says what happened, no endless run."""
    trainer = start(profile="incident", skip_limit=4)
    with pytest.raises(StalledError) as caught:
        trainer.run()
    assert str(caught.value) == (
        "the first 4 steps were all skipped (gradients not finite): nothing was learnt"
    )
    assert caught.value.first == 0


def test_run_that_stalls_later_says_where():
    """From which batch on."""
    trainer = start(skip_limit=3)
    draw = trainer.setting.feeds.train
    spoiled = lambda n: replace(draw(n), r_true=draw(n).r_true * (math.nan if n >= 6 else 1.0))
    trainer.setting = replace(trainer.setting, feeds=replace(trainer.setting.feeds, train=spoiled))
    with pytest.raises(StalledError, match=r"last 3 steps, from batch 6 on, were all skipped"):
        trainer.run()


def test_early_stopping(tmp_path):
    """No better validation loss for so many epochs; a resumed run does not begin again."""
    trainer = start(tmp_path, patience=2, learning_rate=1e-12, average_decay=0.0, steps=400)
    trainer.at.best = -1.0
    assert trainer.run() == "stopped early"
    assert trainer.at.step == 10
    again = start(tmp_path, patience=2, steps=400)
    again.resume(tmp_path / LAST)
    assert again.run() == "stopped early"
    assert again.at.step == 10


def test_curriculum_moves_the_weights_and_not_the_validation():
    """Thirds of the run; the loss that is compared has the configured weights throughout."""
    memory = Memory()
    trainer = start(setting={"listeners": (memory,), "phases": CURRICULUM}, steps=15)
    seen, reweigh = [], trainer.setting.subject.weights
    trainer.setting.listeners[0].advance = lambda _: seen.append(reweigh()["lam_aux"])
    trainer.run()
    assert [epoch.phase for epoch in memory.epochs] == ["angles", "range", "joint"]
    assert seen == pytest.approx([0.0] * 5 + [0.07] * 5 + [0.1] * 5)
    configured = trainer.configured
    assert all(f"lam_{n}" in configured for n in memory.epochs[0].terms)
    assert memory.epochs[0].terms.keys() == memory.epochs[2].terms.keys()
    plain = start(steps=5)
    plain.run()
    terms = validate(
        plain.setting.subject.loss_fn,
        plain.average.module,
        plain.setting.feeds.validation(),
        names=list(memory.epochs[0].terms),
        ranks=Ranks(),
    )[1]
    assert terms.keys() == memory.epochs[0].terms.keys()


def test_blend_rises_and_is_jittered_and_not_in_the_validation():
    """From 0 over a fifth of the steps, two epochs at least; the same after a cut."""
    form = CovarianceForm(blend=0.3, blend_rise=0.5, blend_jitter=0.0)
    training = configure(steps=40).training
    shares = [plan_blend(form, training, step=n, seed=0) for n in (0, 5, 10, 20, 39)]
    assert shares == pytest.approx([0.0, 0.075, 0.15, 0.3, 0.3])
    short = replace(form, blend_rise=0.01)
    assert plan_blend(short, training, step=5, seed=0) == pytest.approx(0.15)
    assert plan_blend(replace(form, blend_rise=0.0), training, step=0, seed=0) == 0.3
    moved = replace(form, blend_jitter=0.05)
    many = [plan_blend(moved, training, step=n, seed=1) for n in range(20, 220)]
    assert min(many) >= 0.25
    assert max(many) <= 0.35
    assert max(many) - min(many) > 0.08
    assert plan_blend(moved, training, step=30, seed=1) == many[10]
    assert plan_blend(moved, training, step=30, seed=2) != many[10]
    assert min(plan_blend(moved, training, step=0, seed=n) for n in range(20)) == 0.0


def test_live_blend_is_that_of_the_step():
    """The objective's own configuration moves; what is looked at has the configured share."""
    trainer, shares = start(steps=10), []
    subject = trainer.setting.subject
    trainer.setting = replace(
        trainer.setting, subject=replace(subject, reblend=lambda s: shares.append(round(s, 6)))
    )
    trainer.run()
    form, training = trainer.setting.origin.config.covariance, trainer.training
    planned = [round(plan_blend(form, training, step=n, seed=0), 6) for n in range(10)]
    assert shares == [*planned[:5], form.blend, *planned[5:], form.blend]
    batch = subject.batches(0)
    values = []
    for share in (0.0, form.blend):
        subject.reblend(share)
        values.append(subject.loss_fn(subject.model, batch)["cov"].item())
    assert values[0] != values[1]


def test_phases_are_thirds_and_name_known_weights():
    """Every factor belongs to a weight; one phase is the whole run."""
    assert [choose_phase(CURRICULUM, n, 9).name for n in (0, 2, 3, 5, 6, 8, 9)] == [
        *["angles"] * 2,
        *["range"] * 2,
        *["joint"] * 3,
    ]
    assert choose_phase(PLAIN, 5, 9).scale({"lam_K": 0.5}) == {"lam_K": 0.5}
    known = assemble(configure(), "sound", seed=0).weights()
    assert all(phase.factors.keys() <= known.keys() for phase in CURRICULUM)


def test_average_warms_up():
    """Update n has decay min(0.99, (n + 1) / (n + 10))."""
    model = torch.nn.Linear(1, 1, bias=False)
    followed = average(model, decay=0.99)
    expected = None
    for n, value in enumerate((1.0, 3.0, -2.0)):
        torch.nn.init.constant_(model.weight, value)
        followed.update_parameters(model)
        d = (n + 1) / (n + 10)
        expected = value if expected is None else d * expected + (1 - d) * value
    assert followed.module.weight.item() == pytest.approx(expected)
    followed.n_averaged.fill_(10_000)
    torch.nn.init.constant_(model.weight, expected + 1.0)
    followed.update_parameters(model)
    assert followed.module.weight.item() == pytest.approx(expected + 0.01)


def test_model_of_a_run_is_its_average(tmp_path):
    """`load_model` of a folder: the best average, in evaluation mode."""
    trainer = start(tmp_path)
    trainer.run()
    model, config = load_model(tmp_path)
    assert config == trainer.setting.origin.config
    assert not model.training
    assert same(model.state_dict(), load_checkpoint(tmp_path / BEST).average)
    assert not same(model.state_dict(), load_checkpoint(tmp_path / LAST).model)


def test_wrong_checkpoints_are_refused_in_one_sentence(tmp_path):
    """Absent, cut short, of another network."""
    with pytest.raises(ValueError, match=r"^there is no checkpoint .*best.safetensors$"):
        load_model(tmp_path)
    start(tmp_path, steps=1).run()
    other = start(tmp_path, profile="incident")
    with pytest.raises(ValueError, match=r"does not fit this network: backbone.blocks.0.body"):
        other.resume(tmp_path / LAST)
    path = tmp_path / BEST
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"is no whole checkpoint"):
        load_model(path)


def test_validation_set_and_shards(tmp_path):
    """Shards of both splits feed a run; without validation shards those scenes are drawn."""
    config = configure()
    for split, scenes in (("train", 64), ("val", 32)):
        plan = Plan(config.choose_scenario(split), split, seed=0, scenes=scenes, shard_size=32)
        list(write_shards(plan, tmp_path))
    trainer = start(data=tmp_path)
    assert trainer.run() == "finished"
    assert sum(b.samples for b in trainer.setting.feeds.validation()) == 16
    for path in tmp_path.glob("val-*"):
        path.unlink()
    drawn = start(data=tmp_path).setting.feeds.validation()
    first = draw_batch(config.scenario, seed=0, split="val", index=0, size=16)
    assert torch.equal(drawn[0].y, first.y)


def test_training_scenes_are_harder_where_the_preset_says_so():
    """The test split is the scenario itself, everywhere."""
    small = PRESETS["small"]
    assert [small.choose_scenario(s) == small.scenario for s in SPLITS] == [False, False, True]
    assert small.training_scenario.power_spread == 10.0
    assert PRESETS["tiny"].training_scenario == PRESETS["tiny"].scenario


def test_epochs_are_counted_in_scenes():
    """A larger batch has fewer steps in an epoch, at least one."""
    assert [Training(batch_size=n).epoch_steps for n in (64, 100, 9999)] == [100, 64, 1]


def test_one_process_is_a_rank_of_its_own(monkeypatch):
    """No process group without torchrun; wrong devices are named."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_ranks("cpu") as ranks:
        assert (ranks.leads, ranks.world, ranks.device.type) == (True, 1, "cpu")
        assert ranks.any(True, False) == [True, False]
    with pytest.raises(ValueError, match=r"^there is no device 'tpu'"), join_ranks("tpu"):
        pass
    with pytest.raises(ValueError, match=r"^a batch of 9 cannot be shared by 2 processes"):
        Ranks(world=2).take_share(9)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"^there is no CUDA device"), join_ranks("cuda"):
            pass
