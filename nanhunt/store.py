"""A report as versioned JSON, there and back, equal; never torch.

Nothing here knows the fields of a record: what is written and what is expected follows from the
records' own type hints. Non-finite numbers are written as text ("nan", "inf", "-inf"), since NaN
is not JSON. A field that the file lacks takes its default and an unknown key is ignored, so that a
file of the same schema stays readable when records gain fields.
"""

import contextlib
import json
import math
import os
import secrets
import stat
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from nanhunt.errors import StoreError
from nanhunt.records import Ablation, Finding, Outcome, Report, Run, Trial

SCHEMA = 1
LIMIT = 64 * 2**20

# Written for readers without Python and ignored when read: record -> key -> property.
_DERIVED: dict[type, dict[str, str]] = {
    Finding: {"term": "term"},
    Run: {"nonfinite": "nonfinite", "parameters": "parameters", "finite": "is_finite"},
    Ablation: {"cures": "cures"},
    Trial: {"proven": "is_proven"},
    Outcome: {"verdict": "verdict", "exit_code": "exit_code", "counts": "counts"},
}
_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_WORDS: dict[Any, str] = {
    str: "text",
    int: "a whole number of 64 bits",
    float: 'a number, "nan", "inf" or "-inf"',
    bool: "true or false",
    types.NoneType: "null",
}


class _UnfitError(Exception):
    """Something that no report holds, told without the name of the file."""


def dump(report: Report | Outcome) -> str:
    """The report, or the outcome of a gate, as strict JSON in ASCII."""
    body = {"schema": SCHEMA, **_encode(report, "report")}
    return json.dumps(body, indent=2, allow_nan=False) + "\n"


def parse_ranks(texts: Mapping[int, str]) -> dict[int, Report]:
    """The reports that processes have dumped, by rank; a text that holds none is left out."""
    found: dict[int, Report] = {}
    for rank, text in texts.items():
        with contextlib.suppress(StoreError):
            found[rank] = parse(text, origin=f"the report of rank {rank}")
    return found


def parse(text: str, *, origin: str = "the text") -> Report:
    """The report that `text` holds; `origin` is what errors call the text."""
    try:
        body = json.loads(text, parse_constant=_refuse_constant)
        _check_schema(body)
        report: Report = _decode_record(body, Report, "")
    except _UnfitError as error:
        raise StoreError(f"{origin}: {error}") from None
    except RecursionError:
        raise StoreError(
            f"{origin}: nested too deeply for a report; give one that nanhunt saved"
        ) from None
    except ValueError as error:
        raise StoreError(f"{origin}: not JSON ({error}); save the report again") from None
    return report


def save(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the report in one piece: afterwards the file is the whole new one or the old one."""
    write(dump(report), path)


def write(text: str, path: str | os.PathLike[str]) -> None:
    """Write a text in one piece: afterwards the file is the whole new one or the old one."""
    try:
        _replace(Path(os.path.realpath(path)), text.encode("utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{os.fspath(path)}: cannot be written ({_reason(error)}); "
            "give a file in a folder that exists and is writable"
        ) from None


def load(path: str | os.PathLike[str]) -> Report:
    """Read a report that `save` wrote."""
    name = os.fspath(path)
    try:
        text = _read(Path(path)).decode("utf-8")
    except UnicodeDecodeError as error:
        raise StoreError(
            f"{name}: not UTF-8 text (byte {error.start}); give a report that nanhunt saved"
        ) from None
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{name}: cannot be read ({_reason(error)}); give a report that nanhunt saved"
        ) from None
    return parse(text, origin=name)


def _read(path: Path) -> bytes:
    """The bytes of a regular file of bearable size."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise OSError("it is a folder")
    if not stat.S_ISREG(mode):
        raise OSError("it is not a regular file")
    with path.open("rb") as file:
        content = file.read(LIMIT + 1)
    if len(content) > LIMIT:
        raise OSError(f"it is larger than the {LIMIT // 2**20} MiB that a report may have")
    return content


def _replace(target: Path, content: bytes) -> None:
    """Put a new file in the place of `target`; leave nothing behind where that fails."""
    if target.exists() and not target.is_file():
        raise OSError("it exists and is not a regular file")
    draft = target.parent / f".nanhunt-{secrets.token_hex(8)}"
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def _reason(error: OSError | ValueError) -> str:
    """What went wrong, without the name of the file."""
    words = (isinstance(error, OSError) and error.strerror) or str(error)
    return words[:1].lower() + words[1:]


def _refuse_constant(name: str) -> float:
    raise _UnfitError(f'{name} is not JSON; write it as text, such as "nan"')


def _check_schema(body: object) -> None:
    """Refuse what is no report, or one of another schema."""
    if not isinstance(body, dict):
        raise _UnfitError(f"holds {_shown(body)}, not an object; give a report that nanhunt saved")
    if "schema" not in body:
        raise _UnfitError("has no `schema`; give a report that nanhunt saved")
    schema = body["schema"]
    if type(schema) is not int or schema != SCHEMA:
        raise _UnfitError(
            f"has schema {_shown(schema)} and this nanhunt reads schema {SCHEMA}; "
            "read it with the nanhunt that saved it, or save the report again"
        )


def _encode(value: Any, place: str) -> Any:
    """The value in JSON's own types; records become objects, with what derives from them."""
    if is_dataclass(value) and not isinstance(value, type):
        items = {f.name: getattr(value, f.name) for f in fields(value)}
        derived = _DERIVED.get(type(value), {})
        items |= {key: getattr(value, name) for key, name in derived.items() if key not in items}
        return {key: _encode(item, f"{place}.{key}") for key, item in items.items()}
    if isinstance(value, Mapping):
        return {str(key): _encode(item, f"{place}[{key}]") for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_encode(item, f"{place}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, str | bool | int):
        return value
    raise StoreError(
        f"{place} is a {type(value).__name__}, which JSON cannot hold; "
        "a report holds text, numbers and records only"
    )


def _decode(value: Any, hint: Any, place: str) -> Any:
    """The value as `hint` wants it."""
    origin = get_origin(hint)
    if origin is not None:
        return _GENERICS[origin](value, hint, place)
    if is_dataclass(hint):
        return _decode_record(value, hint, place)
    return _decode_plain(value, hint, place)


def _decode_plain(value: Any, hint: Any, place: str) -> Any:
    """A text, a number, a truth value or null."""
    if hint is float:
        if isinstance(value, str) and value in _NONFINITE:
            return _NONFINITE[value]
        if type(value) in (int, float) and abs(value) < math.inf:
            return _float(value, place)
    elif type(value) is hint and (hint is not int or -(2**63) <= value < 2**63):
        return value
    raise _misfit(value, hint, place)


def _float(value: float, place: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise _misfit(value, float, place) from None


def _decode_record(value: Any, record: Any, place: str) -> Any:
    """A record; what the file lacks takes its default."""
    if not isinstance(value, dict):
        raise _misfit(value, record, place)
    known = {}
    for field, hint in _hints(record):
        spot = f"{place}.{field.name}".lstrip(".")
        if field.name in value:
            known[field.name] = _decode(value[field.name], hint, spot)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise _UnfitError(f"`{spot}` is missing; give a report that nanhunt saved")
    return record(**known)


@cache
def _hints(record: Any) -> tuple[tuple[Field[Any], Any], ...]:
    """Each field of the record and its type."""
    hints = get_type_hints(record)
    return tuple((field, hints[field.name]) for field in fields(record))


def _decode_tuple(value: Any, hint: Any, place: str) -> tuple[Any, ...]:
    """A list: of any length for `tuple[X, ...]`, else of exactly the given types."""
    arms = get_args(hint)
    if isinstance(value, list) and arms[-1] is Ellipsis:
        arms = arms[:1] * len(value)
    if not isinstance(value, list) or len(value) != len(arms):
        raise _misfit(value, hint, place)
    return tuple(
        _decode(item, arm, f"{place}[{i}]")
        for i, (item, arm) in enumerate(zip(value, arms, strict=True))
    )


def _decode_union(value: Any, hint: Any, place: str) -> Any:
    """The first of several types that takes the value."""
    arms = [arm for arm in get_args(hint) if arm is not types.NoneType]
    if value is None and len(arms) < len(get_args(hint)):
        return None
    if len(arms) == 1 and isinstance(value, list | dict):
        return _decode(value, arms[0], place)
    for arm in arms:
        try:
            return _decode(value, arm, place)
        except _UnfitError:
            continue
    raise _misfit(value, hint, place)


def _decode_literal(value: Any, hint: Any, place: str) -> Any:
    """One word of a closed set."""
    if any(type(value) is type(word) and value == word for word in get_args(hint)):
        return value
    raise _misfit(value, hint, place)


def _decode_mapping(value: Any, hint: Any, place: str) -> dict[Any, Any]:
    """An object whose keys are texts or whole numbers."""
    if not isinstance(value, dict):
        raise _misfit(value, hint, place)
    kind, arm = get_args(hint)
    try:
        keys = [kind(key) for key in value]
    except ValueError:
        raise _misfit(value, hint, place) from None
    items = zip(keys, value.items(), strict=True)
    return {key: _decode(item, arm, f"{place}.{name}") for key, (name, item) in items}


_GENERICS: dict[Any, Callable[[Any, Any, str], Any]] = {
    tuple: _decode_tuple,
    Union: _decode_union,
    types.UnionType: _decode_union,
    Literal: _decode_literal,
    Mapping: _decode_mapping,
    dict: _decode_mapping,
}


def _misfit(value: Any, hint: Any, place: str) -> _UnfitError:
    """The error for a value of the wrong kind."""
    return _UnfitError(
        f"`{place}` is {_shown(value)} instead of {_wanted(hint)}; give a report that nanhunt saved"
    )


def _wanted(hint: Any) -> str:
    """A type in words."""
    arms = get_args(hint)
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(json.dumps, arms))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_wanted, arms))
    if get_origin(hint) is tuple:
        return "a list" if arms[-1] is Ellipsis else f"a list of {len(arms)}"
    return _WORDS.get(hint, "an object")


def _shown(value: Any) -> str:
    """A value from JSON, in few words."""
    if isinstance(value, list | dict):
        kind = "a list" if isinstance(value, list) else "an object"
        return f"{kind} of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
