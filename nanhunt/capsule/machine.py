"""What decides over the bits of a step besides its data: build of torch, processor, device."""

import platform
from functools import cache
from pathlib import Path

import torch

# What each entry is called in a sentence.
_WORDS = {
    "torch": "torch",
    "build": "build of torch",
    "system": "system",
    "processor": "processor",
    "vectors": "vector instructions",
    "device": "device",
}


def read_machine(device: str) -> tuple[tuple[str, str], ...]:
    """What decides over bits on this machine, for a step on a type of device."""
    return (
        ("torch", str(torch.__version__)),
        ("build", str(torch.version.git_version)),
        ("system", f"{platform.system()} {platform.machine()}"),
        ("processor", _processor()),
        ("vectors", torch.backends.cpu.get_cpu_capability()),
        ("device", _device(device)),
    )


def tell_difference(made: tuple[tuple[str, str], ...], here: tuple[tuple[str, str], ...]) -> str:
    """What differs first between two machines, in words; empty where bits can be compared."""
    known = dict(made)
    for name, value in here:
        if name not in known:
            return f"{_WORDS[name]} not known"
        if known[name] != value:
            is_long = name == "build"
            return f"other {_WORDS[name]}" + ("" if is_long else f", {known[name]}, here {value}")
    return ""


def _device(kind: str) -> str:
    if kind == "cuda" and torch.cuda.is_available():
        return f"cuda {torch.cuda.get_device_name()}"
    return kind


@cache
def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
