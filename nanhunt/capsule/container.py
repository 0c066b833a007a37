"""The file: a safetensors file whose header starts with a checksum of everything.

    8 bytes     length of the header
    header      {"__metadata__":{"nanhunt":"capsule 1","checksum":"…","record":"…"},"NAME":{…},…}
    the rest    the tensors, one after the other

The checksum is that of the file with 64 zeros in its place. Any reader of safetensors can open the
file; this one takes it only whole. Nothing in it is executed or taken for a path.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanhunt.capsule.contents import SCHEMA, UnfitError
from nanhunt.capsule.memory import SAFE, Region

# A header is a few hundred bytes for each tensor. More than this is no capsule.
HEADER_LIMIT = 32 * 2**20
# How many values the JSON of a header may have: it bounds the memory that reading it takes.
VALUES_LIMIT = 1_000_000
LIMIT = 64 * 2**30
_DIGITS = 64  # of the checksum
_CHUNK = 4 * 2**20
_HEAD = b'{"__metadata__":{"nanhunt":"capsule %d","checksum":"' % SCHEMA
_START = re.compile(
    rb'\{"__metadata__":\{"nanhunt":"capsule (\d{1,9})","checksum":"([0-9a-f]{64})","record":'
)
_BY_SAFE = dict(SAFE.values())


def draft_of(folder: Path) -> Path:
    """Where a file is written before it is put in its place; the name tells who writes it."""
    return folder / f".capsule-{host()}-{os.getpid()}-{secrets.token_hex(6)}.part"


def host() -> str:
    """A short word for this machine."""
    return hashlib.blake2b(os.uname().nodename.encode(), digest_size=4).hexdigest()


# --- writing -------------------------------------------------------------------------------------


def write_file(path: Path, record: str, regions: Sequence[Region]) -> None:
    """Write a file in one piece: afterwards it is the whole new one, or what was there before.

    Raises:
        OSError: it cannot be written; nothing is left behind.
        UnfitError: it is larger than what can be read.
    """
    header = _header(record, regions)
    size = 8 + len(header) + sum(region.size for region in regions)
    values = _count_values(header)
    if len(header) > HEADER_LIMIT or values > VALUES_LIMIT or size > LIMIT:
        raise UnfitError(
            f"it would have {size} bytes, {len(header)} of them and {values} values in its header; "
            f"a capsule has at most {LIMIT}, {HEADER_LIMIT} and {VALUES_LIMIT}"
        )
    if path.exists() and not path.is_file():
        raise OSError("it exists and is not a regular file")
    draft = draft_of(path.parent)
    # It holds the user's data, so it is theirs alone until they hand it over.
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        try:
            _fill(handle, header, regions)
            os.fsync(handle)
        finally:
            os.close(handle)
        draft.replace(path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
    _flush_folder(path.parent)


def _fill(handle: int, header: bytes, regions: Sequence[Region]) -> None:
    digest = hashlib.blake2b(digest_size=_DIGITS // 2)
    for chunk in _content(header, regions):
        digest.update(chunk)
        _put(handle, chunk)
    os.lseek(handle, 8 + len(_HEAD), os.SEEK_SET)
    _put(handle, memoryview(digest.hexdigest().encode()))


def _content(header: bytes, regions: Sequence[Region]) -> Iterator[memoryview]:
    yield memoryview(len(header).to_bytes(8, "little"))
    yield memoryview(header)
    for region in regions:
        for chunk in region.chunks():
            for start in range(0, len(chunk), _CHUNK):
                yield chunk[start : start + _CHUNK]


def _put(handle: int, content: memoryview) -> None:
    while content:
        content = content[os.write(handle, content) :]


def _flush_folder(folder: Path) -> None:
    """Make the new name last; some file systems cannot, and the file is whole without it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _header(record: str, regions: Sequence[Region]) -> bytes:
    entries: dict[str, Any] = {}
    end = 0
    for region in regions:
        start, end = end, end + region.size
        shape = [*region.shape]
        entries[region.name] = {"dtype": region.dtype, "shape": shape, "data_offsets": [start, end]}
    tail = json.dumps(entries, separators=(",", ":"))[1:-1]
    metadata = _HEAD + b"0" * _DIGITS + b'","record":' + json.dumps(record).encode() + b"}"
    header = metadata + (f",{tail}" if tail else "").encode() + b"}"
    return header + b" " * (-len(header) % 8)


# --- reading -------------------------------------------------------------------------------------


def read_file(path: Path) -> tuple[dict[str, Any], list[Tensor]]:
    """The record of a file and its regions, once its checksum has shown that all is as written.

    Raises:
        OSError: it cannot be read.
        UnfitError: it is no whole capsule.
    """
    # Without O_NONBLOCK, opening a pipe would wait for someone who writes into it.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        mode = os.fstat(handle)
        _check_kind(mode)
        file = os.fdopen(handle, "rb", buffering=0, closefd=False)
        header = _read_header(file, mode.st_size)
        table = parse_json(header)
        if not isinstance(table, dict):
            raise UnfitError("its header is no table of tensors")
        sizes = _check_entries(table, mode.st_size - 8 - len(header))
        regions = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        for region in regions:
            if size := region.numel():
                _read_into(file, _bytes_of(region), size)
    finally:
        os.close(handle)
    _check_sum(header, regions)
    return _record(table), regions


def _check_kind(mode: os.stat_result) -> None:
    if not stat.S_ISREG(mode.st_mode):
        what = "a folder" if stat.S_ISDIR(mode.st_mode) else "not a regular file"
        raise UnfitError(f"it is {what}; give a file that nanhunt wrote")
    if mode.st_size > LIMIT:
        raise UnfitError(f"it has {mode.st_size} bytes, and a capsule has at most {LIMIT}")


def _read_header(file: Any, size: int) -> bytes:
    start = _read(file, 8)
    if len(start) < 8:
        raise UnfitError(f"it has {size} bytes, too few for a capsule; it may be cut short")
    length = int.from_bytes(start, "little")
    if length > HEADER_LIMIT:
        raise UnfitError(
            f"its header is to have {length} bytes, and that of a capsule has at most "
            f"{HEADER_LIMIT}; it is broken or no capsule"
        )
    header = _read(file, length)
    if len(header) < length:
        raise UnfitError(f"it ends within its header, after {size} bytes; it was cut short")
    found = _START.match(header)
    if found is None:
        raise UnfitError("it does not begin as a capsule does; give a file that nanhunt wrote")
    if int(found[1]) != SCHEMA:
        raise UnfitError(
            f"it has schema {int(found[1])} and this nanhunt reads schema {SCHEMA}; read it with "
            f"the nanhunt that wrote it"
        )
    return header


def _read(file: Any, count: int) -> bytes:
    content = bytearray(count)
    done = 0
    while done < count and (more := file.readinto(memoryview(content)[done:])):
        done += more
    return bytes(content[:done])


def _read_into(file: Any, target: memoryview, count: int) -> None:
    done = 0
    while done < count:
        more = file.readinto(target[done : done + _CHUNK])
        if not more:
            raise UnfitError("it ends within its tensors; it was cut short")
        done += more


def parse_json(text: str | bytes) -> Any:
    """JSON of bearable depth and number of values; no key twice, no NaN.

    Raises:
        UnfitError: it is none.
    """
    content = text.encode() if isinstance(text, str) else text
    if _count_values(content) > VALUES_LIMIT:
        raise UnfitError(f"its record has more than {VALUES_LIMIT} values; no capsule has")
    try:
        return json.loads(
            content, parse_constant=_refuse, object_pairs_hook=_object, parse_int=_number
        )
    except RecursionError:
        raise UnfitError("its record is nested too deeply for a capsule") from None
    except ValueError as error:
        raise UnfitError(f"its record is not JSON ({error})") from None


def _count_values(content: bytes) -> int:
    return sum(content.count(mark) for mark in (b",", b"[", b"{"))


def _refuse(name: str) -> float:
    raise UnfitError(f"its record holds {name}, which is not JSON")


def _number(digits: str) -> int:
    if len(digits) > 20:
        raise UnfitError(f"its record holds a whole number of {len(digits)} digits")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise UnfitError("its record names a key twice")
    return found


def _check_entries(table: dict[str, Any], room: int) -> list[int]:
    """The sizes of the regions, which must lie one after the other up to the end of the file."""
    end = 0
    sizes = []
    for name, entry in table.items():
        if name == "__metadata__":
            continue
        start, stop = _offsets(name, entry)
        if start != end or stop < start:
            raise UnfitError(f"its tensor {name[:60]!r} lies at {start} to {stop}, after {end}")
        sizes.append(stop - start)
        end = stop
    if end != room:
        what = "it was cut short" if end > room else "something was added to it"
        raise UnfitError(f"its tensors have {end} bytes and {room} are there; {what}")
    return sizes


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    fault = UnfitError(f"its tensor {name[:60]!r} has no dtype, shape and place that fit together")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fault
    shape, offsets = entry["shape"], entry["data_offsets"]
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not lists or len(shape) > 64 or any(type(n) is not int or n < 0 for n in (*shape, *offsets)):
        raise fault
    item = _BY_SAFE.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if item is None or math.prod(shape) * item != offsets[1] - offsets[0]:
        raise fault
    return offsets[0], offsets[1]


def _bytes_of(region: Tensor) -> memoryview:
    content: Any = region.numpy()
    return memoryview(content)


def _check_sum(header: bytes, regions: Sequence[Tensor]) -> None:
    digest = hashlib.blake2b(digest_size=_DIGITS // 2)
    digest.update(len(header).to_bytes(8, "little"))
    end = len(_HEAD) + _DIGITS
    written = header[len(_HEAD) : end]
    digest.update(header[: len(_HEAD)] + b"0" * _DIGITS + header[end:])
    for region in regions:
        digest.update(_bytes_of(region))
    if digest.hexdigest().encode() != written:
        raise UnfitError("its checksum does not fit its content; it is broken, fetch it again")


def _record(table: dict[str, Any]) -> dict[str, Any]:
    metadata = table["__metadata__"]
    text = metadata.get("record") if isinstance(metadata, dict) else None
    record = parse_json(text) if isinstance(text, str) else None
    if not isinstance(record, dict):
        raise UnfitError("its record is no table")
    return record
