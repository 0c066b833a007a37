"""`detect`: a block of any training code, watched while it runs; torch's `detect_anomaly` in kind.

`block` is the context manager and decorator, `observer` looks at the sinks of a running program and
at births, `wires` leads torch's own calls to it, `naming` knows what modules are called, `allowing`
what the user lets pass, and `wording` makes the report. Nothing is replayed and nothing is put
back: the program runs as it is.
"""

from nanhunt.guarding.block import detect

__all__ = ["detect"]
