"""Compiled functions under a dispatch mode."""

import contextlib
import sys
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def compiled_code_run_eagerly() -> Iterator[None]:
    """Run compiled functions eagerly, and leave them compiled.

    Without this, one call under a dispatch mode leaves them uncompiled for the rest of the process,
    and the compiler traces the mode too. Where it was never imported there is nothing compiled, and
    importing it takes seconds.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        # Compiled modules warn of hooks like ours, which are gone when they run compiled again.
        warnings.filterwarnings("ignore", message=".*when there are global hooks on modules")
        yield
