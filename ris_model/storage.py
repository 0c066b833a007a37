"""Storage: files that are whole or not there, and frozen records as text; nothing is pickled.

A file is written beside its place, flushed to the disk and moved there in one step: a reader, or
a process killed at any moment, finds the old file or the new one, never half of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

Kind = TypeVar("Kind")

# Of the layout of every file written here; a reader of another version refuses.
VERSION = 1
# Entry of the file's metadata that holds everything but the tensors.
_ENTRY = "ris_model"
# How much of a hash tells two records apart.
_HASH_LENGTH = 16


def write_whole(path: Path, content: bytes) -> None:
    """Put content at a path, or leave there what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    # the new name itself has to reach the disk as well
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    form: str,
    record: Mapping[str, Any],
) -> None:
    """Write named tensors and a JSON record as one safetensors file.

    Complex tensors are written as pairs of real numbers. The record travels in the file's header,
    so that the two cannot be parted.

    Args:
        path: where to.
        tensors: on any device.
        form: what the file is, for instance "checkpoint".
        record: JSON values, all numbers finite.
    """
    held = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    complexes = sorted(name for name, tensor in held.items() if tensor.is_complex())
    plain = {
        name: (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).contiguous()
        for name, t in held.items()
    }
    header = {
        "form": form,
        "version": VERSION,
        "complex": complexes,
        "record": record,
        "checksum": _sum_bytes(plain),
    }
    # one entry: safetensors writes several in no fixed order
    text = json.dumps(header, allow_nan=False)
    write_whole(path, save(plain, metadata={_ENTRY: text}))


def read_tensors(path: Path, *, form: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Raises:
        ValueError: when there is no such file, it is of another form or version, or not whole;
            one sentence that names it.
    """
    header = _read_header(path, form)
    try:
        with safe_open(path, framework="pt") as file:
            plain = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError) as error:
        raise _complain_of_break(path, form, error) from None
    if _sum_bytes(plain) != header["checksum"]:
        raise _complain_of_break(path, form, "its checksum does not fit its contents")
    for name in header["complex"]:
        plain[name] = torch.view_as_complex(plain[name])
    return plain, header["record"]


def read_record(path: Path, *, form: str) -> dict[str, Any]:
    """Read the JSON record alone; raises as `read_tensors` does."""
    record: dict[str, Any] = _read_header(path, form)["record"]
    return record


def hash_record(record: Any) -> str:
    """Return a short hash of a frozen record or of a JSON value."""
    plain = asdict(record) if is_dataclass(record) and not isinstance(record, type) else record
    text = json.dumps(plain, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_HASH_LENGTH]


def read_fields(kind: type[Kind], values: Any, *, place: str = "") -> Kind:
    """Build a frozen record from JSON values, the inverse of `dataclasses.asdict`.

    A field that is missing takes its default, where it has one.

    Raises:
        ValueError: for an unknown, missing or unfit field, named with its place.
    """
    hints = get_type_hints(kind)
    where = place or kind.__name__
    if not isinstance(values, dict):
        msg = f"{where} is {values!r}; give a table of its fields"
        raise ValueError(msg)  # noqa: TRY004  wrong input is a ValueError everywhere here
    unknown = sorted(set(values) - set(hints))
    if unknown:
        msg = f"{where} has no field {unknown[0]!r}; it has {', '.join(hints)}"
        raise ValueError(msg)
    built = {
        field.name: _read_value(hints[field.name], values[field.name], f"{where}.{field.name}")
        for field in fields(kind)  # type: ignore[arg-type]  # a frozen record is what comes
        if field.name in values
    }
    try:
        return kind(**built)
    except TypeError as error:
        msg = f"{where} is incomplete: {error}"
        raise ValueError(msg) from None


def _read_value(hint: Any, value: Any, place: str) -> Any:
    """Read one value as its annotation says."""
    if is_dataclass(hint):
        return read_fields(hint, value, place=place)  # type: ignore[arg-type]
    if isinstance(value, list):
        value = tuple(value)
    if hint is float and type(value) is int:
        value = float(value)
    if not _fits(hint, value):
        name = getattr(hint, "__name__", None) if get_origin(hint) is None else None
        msg = f"{place} is {value!r}; give {name or str(hint).replace('typing.', '')}"
        raise ValueError(msg)
    return value


def _fits(hint: Any, value: Any) -> bool:
    """Whether a JSON value is of an annotation."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin in (UnionType, Union):
        return any(_fits(argument, value) for argument in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(arguments[0], part) for part in value)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint


def _read_header(path: Path, form: str) -> dict[str, Any]:
    """Return the metadata of a file of this form and version."""
    if not path.is_file():
        msg = f"there is no {form} {path}"
        raise ValueError(msg)
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_ENTRY, "{}")
    except (SafetensorError, OSError) as error:
        raise _complain_of_break(path, form, error) from None
    header: dict[str, Any] = json.loads(text)
    if header.get("form") != form:
        msg = f"{path} is no {form} of ris-model but {header.get('form', 'another file')}"
        raise ValueError(msg)
    if header["version"] != VERSION:
        msg = (
            f"{path} is a {form} of version {header['version']}; this program reads version "
            f"{VERSION}"
        )
        raise ValueError(msg)
    return header


def _complain_of_break(path: Path, form: str, error: object) -> ValueError:
    """One sentence about a broken file."""
    reason = " ".join(str(error).split())
    return ValueError(f"{path} is no whole {form} ({reason}); it may be broken: delete it")


def _sum_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Checksum of names and bytes, in the order of the names."""
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(name.encode(), total)
        total = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, total)
    return total
