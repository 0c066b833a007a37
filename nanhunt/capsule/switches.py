"""The settings of torch that decide over the bits of a step: read, and put back."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from nanhunt.capsule.contents import Settings

# Switches of torch.backends that are attributes, by their path.
_ATTRIBUTES = (
    "cudnn.enabled",
    "cudnn.benchmark",
    "cudnn.deterministic",
    "cudnn.allow_tf32",
    "cuda.matmul.allow_tf32",
    "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction",
    "cuda.matmul.allow_fp16_accumulation",
)
# Those that are set by one function and read by another.
_FUNCTIONS: dict[str, tuple[Callable[[], bool], Callable[[bool], object]]] = {
    f"cuda.{kind}_sdp": (
        getattr(torch.backends.cuda, f"{kind}_sdp_enabled"),
        getattr(torch.backends.cuda, f"enable_{kind}_sdp"),
    )
    for kind in ("flash", "mem_efficient", "math", "cudnn")
}
PRECISIONS = ("highest", "high", "medium")
MOST_THREADS = 1024


def read_settings(model: nn.Module, *, scaler: Any = None) -> Settings:
    """The settings as they are now, around a step of a model."""
    device = next((p.device.type for p in model.parameters()), "cpu")
    kinds = dict.fromkeys(("cpu", "cuda", device))
    return Settings(
        device=device,
        autocast=tuple(
            (kind, torch.is_autocast_enabled(kind), _name(torch.get_autocast_dtype(kind)))
            for kind in kinds
            if torch.amp.autocast_mode.is_autocast_available(kind)
        ),
        autocast_cache=torch.is_autocast_cache_enabled(),
        scaler=dict(scaler.state_dict()) if scaler is not None else None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        deterministic_warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        precision=torch.get_float32_matmul_precision(),
        flags=_read_flags(),
        threads=torch.get_num_threads(),
        default_dtype=_name(torch.get_default_dtype()),
        flush_denormal=_flushes(),
        training={name: module.training for name, module in model.named_modules()},
    )


@contextlib.contextmanager
def settings_applied(settings: Settings, *, device: str = "") -> Iterator[None]:
    """Torch's settings as they were around the step; on leaving they are as before.

    Args:
        settings: those of the capsule. The modes of the modules are set by `open_capsule`.
        device: the type of the device on which the step runs now. The autocast state that the
            step's own device had is entered there. Empty: as it was.
    """
    before = read_settings(nn.Identity())
    try:
        _apply(settings)
        with contextlib.ExitStack() as stack:
            for kind, is_enabled, dtype in _autocasts(settings, device or settings.device):
                stack.enter_context(
                    torch.autocast(
                        kind,
                        dtype=getattr(torch, dtype),
                        enabled=is_enabled,
                        cache_enabled=settings.autocast_cache,
                    )
                )
            yield
    finally:
        _apply(before)


def _autocasts(settings: Settings, device: str) -> Iterator[tuple[str, bool, str]]:
    """The autocast states to enter, each device type once."""
    states = {kind: (is_enabled, dtype) for kind, is_enabled, dtype in settings.autocast}
    if settings.device in states and device != settings.device:
        states[device] = states[settings.device]
    for kind, (is_enabled, dtype) in states.items():
        is_here = kind == "cpu" or (kind == "cuda" and torch.cuda.is_available())
        if is_here or kind == device:
            yield kind, is_enabled, dtype


def _apply(settings: Settings) -> None:
    torch.use_deterministic_algorithms(
        settings.deterministic, warn_only=settings.deterministic_warn_only
    )
    torch.set_float32_matmul_precision(settings.precision)
    for name, value in settings.flags.items():
        _set_flag(name, value)
    if settings.threads != torch.get_num_threads():
        torch.set_num_threads(settings.threads)
    torch.set_default_dtype(getattr(torch, settings.default_dtype))
    if settings.flush_denormal != _flushes():
        torch.set_flush_denormal(settings.flush_denormal)


def _read_flags() -> dict[str, bool]:
    flags: dict[str, bool] = {}
    for path in _ATTRIBUTES:
        # Torch refuses to tell some where the older and the newer names of one were mixed.
        with contextlib.suppress(RuntimeError, AttributeError):
            home, name = _home(path)
            flags[path] = bool(getattr(home, name))
    return flags | {name: bool(read()) for name, (read, _) in _FUNCTIONS.items()}


def _set_flag(path: str, value: bool) -> None:  # noqa: FBT001 - a switch is its value
    if path in _FUNCTIONS:
        read, write = _FUNCTIONS[path]
        if read() != value:
            write(value)
    elif path in _ATTRIBUTES:
        with contextlib.suppress(RuntimeError, AttributeError):
            home, name = _home(path)
            if bool(getattr(home, name)) != value:
                setattr(home, name, value)


def _home(path: str) -> tuple[Any, str]:
    home: Any = torch.backends
    *parents, name = path.split(".")
    for parent in parents:
        home = getattr(home, parent)
    return home, name


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _flushes() -> bool:
    """Whether this thread flushes denormal numbers to zero; torch only tells by doing it."""
    tiny = torch.tensor([1e-40], dtype=torch.float32, device="cpu")
    return bool((tiny * 1.0).view(torch.int32).item() == 0)
