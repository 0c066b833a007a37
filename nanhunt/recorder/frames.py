"""The line of the user's code under which an op ran.

The hot path stores a code object and an instruction offset; the line is worked out when the trace
is read.
"""

import functools
import os
import sys
import sysconfig
from pathlib import Path
from types import CodeType, FrameType
from typing import TypeAlias

import torch

from nanhunt.records import Frame

Place: TypeAlias = tuple[CodeType, int]
# The line of the user, the line that applied a custom Function if any, and the call of a module
# within which the same is found from torch's own frames.
Caller: TypeAlias = tuple[Place | None, Place | None, FrameType | None]
NOBODY: Caller = (None, None, None)

ENGINE_CODE: CodeType = torch.autograd.graph._engine_run_backward.__code__  # noqa: SLF001
_APPLY_CODE: CodeType = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
_MODULE_CODE: CodeType = torch.nn.Module._call_impl.__code__  # noqa: SLF001 - no public name
_BACKWARD_CODE: CodeType = torch.autograd.function.BackwardCFunction.apply.__code__

_MODULE_FILE = torch.nn.modules.module.__file__
_TORCH_DIR = str(Path(torch.__file__).parent) + os.sep
_OWN_DIR = str(Path(__file__).parents[1]) + os.sep
# Modes and what is wrapped around torch's functions stand between an op and the user's code; every
# other room of ours is where a step began.
_MODE_PLACES = (
    _OWN_DIR + "recorder" + os.sep,
    _OWN_DIR + "interventions",
    _OWN_DIR + "guarding" + os.sep,
    _OWN_DIR + "launch" + os.sep,
    _OWN_DIR + "trials" + os.sep,
)
_STDLIB_DIR = sysconfig.get_paths()["stdlib"] + os.sep
_PACKAGE_DIRS = tuple({sysconfig.get_paths()[key] + os.sep for key in ("purelib", "platlib")})


_PASS, USER, BOUNDARY = range(3)


# Two code objects may be equal and stand in different files, so this goes by the file.
_KINDS: dict[str, int] = {}


def _kind_of(file: str) -> int:
    """Whether a file is the user's, where nothing further out can be, or to be passed over."""
    if file.startswith(_OWN_DIR):
        return _PASS if file.startswith(_MODE_PLACES) else BOUNDARY
    if file.startswith((_TORCH_DIR, "<frozen")):
        return _PASS
    is_library = file.startswith(_STDLIB_DIR) and not file.startswith(_PACKAGE_DIRS)
    return _PASS if is_library else USER


def kind_of(file: str) -> int:
    """The same, looked up once per file."""
    kind = _KINDS.get(file)
    if kind is None:
        kind = _KINDS[file] = _kind_of(file)
    return kind


def user_call(
    frame: FrameType | None = None, known: Caller = NOBODY, *, past_engine: bool = False
) -> Caller:
    """Find the innermost line of the user, and the line that applied a custom Function, if any.

    The engine's frame ends the search: an op of a C++ node has no line of its own, its origin is
    looked up. With `past_engine` it goes on to the line that called the backward.

    Args:
        frame: where the search starts; the caller's if None.
        known: what was found before, to be taken where the same call of a module is met: while a
            call lasts, nothing further out moves.
        past_engine: whether to look beyond the engine.
    """
    # The documented way to a frame is 50x slower.
    frame = frame or sys._getframe(1)  # noqa: SLF001
    call: FrameType | None = None
    known_call = known[2]
    while frame is not None:
        if frame is known_call:
            return known
        code = frame.f_code
        kind = _KINDS.get(code.co_filename)
        if kind is None:
            kind = _KINDS[code.co_filename] = _kind_of(code.co_filename)
        if kind == USER:
            return (code, frame.f_lasti), _applier(frame), call
        if code is _MODULE_CODE:
            call = call or frame
        elif kind == BOUNDARY or (code is ENGINE_CODE and not past_engine):
            break
        frame = frame.f_back
    return None, None, call


def call_path() -> tuple[Place, ...] | None:
    """The calls from the one that torch was asked for out to the innermost line of the user.

    None where no line of the user asked for it. How torch calls a module differs with the hooks
    that there are, and which of our modes stands in between with what is tried, so the frames of
    these are left out.
    """
    path: list[Place] = []
    frame: FrameType | None = sys._getframe(2)  # noqa: SLF001 - as above
    while frame is not None:
        code = frame.f_code
        kind = _KINDS.get(code.co_filename)
        if kind is None:
            kind = _KINDS[code.co_filename] = _kind_of(code.co_filename)
        if kind == BOUNDARY:
            return None
        if code.co_filename != _MODULE_FILE and not code.co_filename.startswith(_OWN_DIR):
            path.append((code, frame.f_lasti))
        if kind == USER:
            return tuple(path)
        frame = frame.f_back
    return None


def _applier(frame: FrameType) -> Place | None:
    """Return the user's call of `Function.apply` when `frame` is the body of its forward."""
    back = frame.f_back
    if back is None or back.f_code is not _APPLY_CODE:
        return None
    back = back.f_back
    return (back.f_code, back.f_lasti) if back is not None else None


def is_in_backward() -> bool:
    """Whether the op runs in the backward of a Python Function, and not in a hook of its node."""
    frame: FrameType | None = sys._getframe(2)  # noqa: SLF001 - as above
    while frame is not None and frame.f_code is not ENGINE_CODE:
        if frame.f_code is _BACKWARD_CODE:
            return True
        frame = frame.f_back
    return False


def read_frame(code: CodeType, offset: int) -> Frame:
    """The line of the instruction at a byte offset: the first line of a call that spans several."""
    return Frame(code.co_filename, _line_at(code, offset), code.co_qualname)


@functools.lru_cache(maxsize=65536)
def _line_at(code: CodeType, offset: int) -> int:
    for index, positions in enumerate(code.co_positions()):
        if index == offset // 2 and positions[0]:
            return positions[0]
    return code.co_firstlineno
