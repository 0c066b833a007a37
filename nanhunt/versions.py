"""What a report ran on: the packages whose versions it names."""

import platform
from importlib import metadata

import torch


def versions() -> tuple[tuple[str, str], ...]:
    """Each package and its version; nanhunt's own is unknown where it is not installed."""
    try:
        own = metadata.version("nanhunt")
    except metadata.PackageNotFoundError:
        own = "unknown"
    return (
        ("nanhunt", own),
        ("torch", str(torch.__version__)),
        ("python", platform.python_version()),
    )
