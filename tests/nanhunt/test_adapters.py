"""The adapters to training frameworks, with the real packages: watched, withheld, to the bit."""

import copy
import logging
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import nanhunt

pytestmark = pytest.mark.filterwarnings("default")  # other people's packages warn as they please
FAILING = 3  # the batch whose argument of sqrt is 0


class Net(nn.Module):
    """A small net whose loss has a sqrt without a guard."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.drop = nn.Dropout(0.2)

    def forward(self, x, labels=None):
        size = self.drop(self.layer(x)).square() * labels.unsqueeze(-1)
        return {"loss": size.sum(-1).sqrt().mean()}  # CULPRIT


LINE = next(
    number
    for number, text in enumerate(Path(__file__).read_text(encoding="utf-8").splitlines(), 1)
    if text.endswith("# CULPRIT")
)


def batches(count=6, *, failing=FAILING):
    """Inputs and weights; a weight of 0 makes the argument of sqrt 0."""
    generator = torch.Generator().manual_seed(0)
    made = [(torch.randn(2, 4, generator=generator), torch.ones(2)) for _ in range(count)]
    if failing is not None:
        made[failing][1][1] = 0.0
    return made


def assert_same(one, other):
    """Two models hold the same bits."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def assert_named(reports):
    """One report, which names the line."""
    assert len(reports) == 1
    first = reports[0].culprits[0]
    assert (first.op, first.line) == ("aten::sqrt", LINE)


# -- Lightning -----------------------------------------------------------------------------------


@pytest.fixture
def fit(tmp_path):
    """Train a Lightning module on batches, with callbacks."""
    lightning = pytest.importorskip("lightning.pytorch")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.logged = Net(), 0

        def training_step(self, batch, batch_idx):
            loss = self.net(*batch)["loss"]
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    def train(data, *callbacks, **options):
        torch.manual_seed(0)
        module = Module()
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", callbacks=list(callbacks), default_root_dir=tmp_path,
            logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, **options,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
        return module

    return train


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}],
    ids=str,
)
def test_lightning_trains_to_the_same_bits(fit, options):
    """Under the callback as without it."""
    from nanhunt.adapters.lightning import WatchCallback

    callback = WatchCallback()
    data = batches(failing=None)
    assert_same(fit(data, callback, **options), fit(data, **options))
    steps = len(data) // options.get("accumulate_grad_batches", 1)
    assert [row.stepped for row in callback.watch.figures] == [True] * steps
    assert all(0 < row.loss < 10 for row in callback.watch.figures)


def test_lightning_withholds_a_failing_step_and_names_the_line(fit):
    """The parameters stay finite, and training goes on."""
    from nanhunt.adapters.lightning import WatchCallback

    reports = []
    module = fit(batches(), WatchCallback(on_report=reports.append))
    assert_named(reports)
    assert all(p.isfinite().all() for p in module.parameters())
    assert "log" not in vars(module)


def test_lightning_stops_where_the_policy_is_to_raise(fit):
    """With the report in the error."""
    from nanhunt.adapters.lightning import WatchCallback

    with pytest.raises(nanhunt.NonFiniteError, match="sqrt, in its backward") as caught:
        fit(batches(), WatchCallback(policy="raise"))
    assert_named([caught.value.report])


# -- Transformers --------------------------------------------------------------------------------


@pytest.fixture
def run_trainer(tmp_path):
    """Train a model with the Trainer, with callbacks."""
    transformers = pytest.importorskip("transformers")

    def train(data, *callbacks, **options):
        torch.manual_seed(0)
        model = Net()
        rows = [
            {"x": x, "labels": weight} for xs, ws in data for x, weight in zip(xs, ws, strict=True)
        ]
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=1, per_device_train_batch_size=2,
            use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, seed=0,
            learning_rate=0.01, **options,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks)
        )
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
        trainer.train()
        return model

    return train


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.0}, {"bf16": True}],
    ids=str,
)  # fmt: skip
def test_transformers_trains_to_the_same_bits(run_trainer, options):
    """Under the callback as without it."""
    from nanhunt.adapters.transformers import WatchCallback

    callback = WatchCallback()
    data = batches(failing=None)
    assert_same(run_trainer(data, callback, **options), run_trainer(data, **options))
    steps = len(data) // options.get("gradient_accumulation_steps", 1)
    assert [row.stepped for row in callback.watch.figures] == [True] * steps


def test_transformers_withholds_a_failing_step_and_names_the_line(run_trainer):
    """And says that the log of the framework hides it; no hook is left on the model."""
    from nanhunt.adapters.transformers import WatchCallback

    reports = []
    with pytest.warns(UserWarning, match="logging_nan_inf_filter"):
        model = run_trainer(batches(), WatchCallback(on_report=reports.append))
    assert_named(reports)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_transformers_says_nothing_where_nothing_is_hidden(run_trainer):
    """A trainer that logs what is there gives no warning of ours."""
    from nanhunt.adapters.transformers import WatchCallback

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run_trainer(batches(failing=None), WatchCallback(), logging_nan_inf_filter=False)
    assert not [w for w in said if "logging_nan_inf_filter" in str(w.message)]


# -- Accelerate ----------------------------------------------------------------------------------


@pytest.fixture
def prepared():
    """An accelerator, and a model, an optimizer and a scheduler that it has prepared."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def prepare(**options):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        torch.manual_seed(0)
        accelerator = accelerate.Accelerator(cpu=True, **options)
        model = Net()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return accelerator, *accelerator.prepare(model, optimizer, scheduler)

    return prepare


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=str)
def test_accelerate_trains_to_the_same_bits(prepared, options):
    """As the documented loop does that it replaces."""
    from nanhunt.adapters.accelerate import AccelerateWatch

    data = batches(failing=None)
    accelerator, plain, optimizer, scheduler = prepared(**options)
    for x, weight in data:
        with accelerator.accumulate(plain):
            accelerator.backward(plain(x, weight)["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(plain.parameters(), 0.1)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    plain = copy.deepcopy(plain)
    rates = [group["lr"] for group in optimizer.param_groups]
    accelerator, model, optimizer, scheduler = prepared(**options)
    watched = AccelerateWatch(accelerator, model, optimizer, scheduler=scheduler, clip=0.1)
    outcomes = [watched.step(lambda b: model(*b)["loss"], batch=batch) for batch in data]
    assert_same(plain, model)
    assert rates == [group["lr"] for group in optimizer.param_groups]
    steps = len(data) // options.get("gradient_accumulation_steps", 1)
    assert sum(outcome.stepped for outcome in outcomes) == steps


def test_accelerate_withholds_a_failing_step_and_names_the_line(prepared):
    """The scheduler waits too."""
    from nanhunt.adapters.accelerate import AccelerateWatch

    reports = []
    accelerator, model, optimizer, scheduler = prepared()
    watched = AccelerateWatch(
        accelerator, model, optimizer, scheduler=scheduler, on_report=reports.append
    )
    outcomes = [watched.step(lambda b: model(*b)["loss"], batch=batch) for batch in batches()]
    assert_named(reports)
    assert [outcome.why for outcome in outcomes] == ["", "", "", "nonfinite", "", ""]
    assert scheduler.scheduler.last_epoch == len(outcomes) - 1
    assert all(p.isfinite().all() for p in model.parameters())
