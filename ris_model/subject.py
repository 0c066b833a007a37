"""Subject: hands the whole system to whoever wants to examine it, by shape, not by import."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import cast

import torch
from torch import nn

from ris_model.checkpoint import NETWORKS
from ris_model.config import Config, Profile, apply_profile, choose_preset
from ris_model.data import Batch, draw_batch
from ris_model.losses import Objective, SoundObjective
from ris_model.network import Detector, Localiser
from ris_model.training import plan_rate

# Option -> the precision of the network under autocast; the loss is FP32 at least.
AMP_DTYPES: dict[str, torch.dtype | None] = {
    "off": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# Profile -> its network and its objective.
PROFILES: dict[str, tuple[type[Localiser | Detector], type[Objective]]] = {
    "incident": (NETWORKS["incident"], Objective),
    "sound": (NETWORKS["sound"], SoundObjective),
}
# Of the sound profile under FP16. Its gradients are of order 1 to 10 at first: no step is lost to
# finding a scale, and a gradient of 1e-7 is still above what FP16 flushes to zero.
_FIRST_SCALE = 1024.0
_GREATEST_SEED = 2**63 - 1  # what torch.manual_seed takes
GROUPS: dict[str, tuple[str, ...]] = {"backbone": ("backbone",), "head": ("head",)}

LossFn = Callable[[nn.Module, Batch], dict[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Subject:
    """Everything that one training step needs."""

    model: nn.Module
    batches: Callable[[int], Batch]  # index -> batch of the training split
    loss_fn: LossFn  # weighted terms by name; their sum is the loss
    name: str
    seed: int
    optimizer: torch.optim.Optimizer
    weights: Callable[[], dict[str, float]]  # as the live objective holds them
    reweight: Callable[[str, float], None]  # sets one there
    reblend: Callable[[float], None]  # sets the share of the samples in R_blend there
    configured: dict[str, float]  # the weights as the configuration has them
    scaler: torch.amp.GradScaler | None = None
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    groups: dict[str, tuple[str, ...]] = field(default_factory=lambda: dict(GROUPS))


def build(
    profile: str = "incident",
    preset: str = "full",
    *,
    seed: int | str = 0,
    amp: str = "off",
    batch_size: int | str | None = None,
) -> Subject:
    """Build a profile at a preset's size.

    Options may be text, as a command line brings them. The seed decides the parameters and the
    data; the random state of the caller is left as it was.

    Raises:
        ValueError: for an option that is not known, with what would be.
    """
    config = choose_config(profile, preset)
    root = _read_whole("seed", seed, least=0, most=_GREATEST_SEED)
    if batch_size is not None:
        size = _read_whole("batch_size", batch_size, most=config.training.train_scenes, least=1)
        config = replace(config, training=replace(config.training, batch_size=size))
    return assemble(config, cast("Profile", profile), seed=root, amp=amp)


def choose_config(profile: str, preset: str) -> Config:
    """Return the configuration of a profile at a preset's size; a ValueError for unknown ones."""
    if profile not in PROFILES:
        msg = f"there is no profile {profile!r}; choose one of {', '.join(PROFILES)}"
        raise ValueError(msg)
    return apply_profile(choose_preset(preset), cast("Profile", profile))


def assemble(
    config: Config,
    profile: Profile,
    *,
    seed: int,
    amp: str = "off",
    device: str | torch.device = "cpu",
) -> Subject:
    """Put a configuration together: network, objective, optimizer and what belongs to them.

    Raises:
        ValueError: for an unknown precision.
    """
    network, objective_of = PROFILES[profile]
    precision = _choose_precision(amp)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(config).to(device)
    objective = objective_of(config)
    optimizer = _make_optimizer(model, config)
    kind = torch.device(device).type
    return Subject(
        model=model,
        batches=_number_batches(config, seed=seed),
        loss_fn=_compose_loss(objective, precision),
        name=f"ris:{profile}",
        seed=seed,
        optimizer=optimizer,
        weights=objective.list_weights,
        reweight=objective.reweight,
        reblend=objective.reblend,
        configured=asdict(config.weights),
        scaler=_make_scaler(profile, kind) if precision is torch.float16 else None,
        scheduler=plan_rate(optimizer, config.training) if profile == "sound" else None,
    )


def incident(
    preset: str = "full",
    seed: int | str = 0,
    *,
    amp: str = "off",
    batch_size: int | str | None = None,
) -> Subject:
    """Build the system of the case report, as it failed on its first batch."""
    return build("incident", preset, seed=seed, amp=amp, batch_size=batch_size)


def sound(
    preset: str = "full",
    seed: int | str = 0,
    *,
    amp: str = "off",
    batch_size: int | str | None = None,
) -> Subject:
    """Build the system as it should be: every term with a defined gradient."""
    return build("sound", preset, seed=seed, amp=amp, batch_size=batch_size)


def _choose_precision(amp: str) -> torch.dtype | None:
    """Autocast dtype of an option."""
    if amp not in AMP_DTYPES:
        msg = f"amp={amp!r} is not known; choose one of {', '.join(AMP_DTYPES)}"
        raise ValueError(msg)
    return AMP_DTYPES[amp]


def _read_whole(name: str, value: int | str, *, least: int, most: int) -> int:
    """Read a whole number that may be text."""
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        msg = f"{name} is {value!r}; give a whole number from {least} to {most}"
        raise ValueError(msg)
    return number


def _number_batches(config: Config, *, seed: int) -> Callable[[int], Batch]:
    """Index -> batch of the training split, made when asked for."""
    available = config.training.count_batches("train")
    size = config.training.batch_size

    def draw(index: int) -> Batch:
        if not 0 <= index < available:
            msg = f"there is no batch {index}; the training split has batches 0 to {available - 1}"
            raise IndexError(msg)
        world = config.training_scenario
        return draw_batch(world, seed=seed, split="train", index=index, size=size)

    return draw


def _compose_loss(objective: Objective, precision: torch.dtype | None) -> LossFn:
    """Network under autocast when asked for, loss outside it."""

    def loss_fn(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        with torch.autocast(batch.y.device.type, dtype=precision, enabled=precision is not None):
            prediction = model(batch)
        terms: dict[str, torch.Tensor] = objective(prediction, batch)
        return terms

    return loss_fn


def _make_scaler(profile: str, device: str) -> torch.amp.GradScaler:
    """Scaler of the FP16 network; the incident has torch's own first scale, 65536."""
    if profile == "incident":
        return torch.amp.GradScaler(device)
    return torch.amp.GradScaler(device, init_scale=_FIRST_SCALE)


def _make_optimizer(model: Localiser | Detector, config: Config) -> torch.optim.Optimizer:
    """AdamW; the head learns faster than the backbone."""
    rate = config.training.learning_rate
    groups = [
        {"params": list(model.backbone.parameters()), "lr": rate},
        {"params": list(model.head.parameters()), "lr": rate * config.training.head_factor},
    ]
    return torch.optim.AdamW(groups, weight_decay=config.training.weight_decay)
