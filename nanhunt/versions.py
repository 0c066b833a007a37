"""What a report ran on: the packages whose versions it names."""

import functools
import platform
from importlib import metadata

import torch


@functools.cache
def versions() -> tuple[tuple[str, str], ...]:
    """Each package and its version; nanhunt's own is unknown where it is not installed.

    Looking them up takes as long as a small model's step, and they stay what they are.
    """
    try:
        own = metadata.version("nanhunt")
    except metadata.PackageNotFoundError:
        own = "unknown"
    return (
        ("nanhunt", own),
        ("torch", str(torch.__version__)),
        ("python", platform.python_version()),
    )
