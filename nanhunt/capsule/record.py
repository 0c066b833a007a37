"""A capsule as one file, there and back: the record, and what its fields must be."""

import json
import math
import os
import random
import types
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from numpy.random import RandomState
from torch import Tensor

from nanhunt.capsule.container import read_file, write_file
from nanhunt.capsule.contents import Capsule, Settings, UnfitError
from nanhunt.capsule.memory import DTYPES, Region
from nanhunt.capsule.reading import Reader, read_view
from nanhunt.capsule.spelling import ROOM, Speller
from nanhunt.capsule.switches import MOST_THREADS, PRECISIONS
from nanhunt.errors import CapsuleError
from nanhunt.generators import Generators

_WORDS = 624  # of the state of a Mersenne twister
_MOST_STATE = 2**16


def write_capsule(capsule: Capsule, path: str | os.PathLike[str]) -> Path:
    """Write a capsule in one piece: afterwards the file is the whole new one or the old one.

    What it cannot hold is named in the file's `incomplete`.

    Raises:
        CapsuleError: it cannot be written; nothing is left behind.
    """
    target = Path(path)
    try:
        write_file(Path(os.path.realpath(target)), *spell(capsule))
    except (OSError, ValueError, UnfitError, MemoryError, RuntimeError) as error:
        raise CapsuleError(
            f"{os.fspath(path)}: cannot be written ({_reason(error)}); "
            "give a file in a folder that exists and has room"
        ) from None
    return target


def read_capsule(path: str | os.PathLike[str]) -> Capsule:
    """Read a capsule; its tensors are on the CPU. Nothing in it is executed or imported.

    Raises:
        CapsuleError: it cannot be read, is no capsule, is broken, or of another schema.
    """
    name = os.fspath(path)
    try:
        record, regions = read_file(Path(path))
        with warnings.catch_warnings():  # that some kinds of tensors are new to torch is no news
            warnings.simplefilter("ignore")
            return read(record, regions)
    except UnfitError as error:
        raise CapsuleError(f"{name}: {error}") from None
    except MemoryError:
        raise CapsuleError(f"{name}: there is not enough memory to read it") from None
    except OSError as error:
        raise CapsuleError(
            f"{name}: cannot be read ({_reason(error)}); give a file that nanhunt wrote"
        ) from None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        # Values that torch, numpy or Python refuse when what was stored is put together again.
        raise CapsuleError(
            f"{name}: cannot be put together ({_reason(e)}); it is broken or was made by hand"
        ) from None


def find_lost(capsule: Capsule) -> tuple[str, ...]:
    """What of a capsule could not be written, by name."""
    speller = Speller()
    _spell_fields(speller, capsule)
    return tuple(dict.fromkeys((*capsule.incomplete, *speller.lost)))


def spell(capsule: Capsule) -> tuple[str, list[Region]]:
    """The record of a capsule as JSON, and the memory that it names."""
    speller = Speller()
    record = _spell_fields(speller, capsule)
    views, regions = speller.memory.lay_out()
    lost = tuple(dict.fromkeys((*capsule.incomplete, *speller.lost)))
    record["incomplete"] = speller.spell(lost, "incomplete")
    record["tensors"] = speller.tensors
    record["views"] = [{name: getattr(view, name) for name in view.__slots__} for view in views]
    return json.dumps(record, allow_nan=False, separators=(",", ":")), regions


def _spell_fields(speller: Speller, capsule: Capsule) -> dict[str, Any]:
    """Every field in the order in which a person would want to read them."""
    skipped = ("batch", "incomplete", "model", "generators", "settings")
    plain = [f.name for f in fields(Capsule) if f.name not in skipped]
    speller.room = ROOM
    record = {"batch": speller.part(capsule.batch, "batch")}
    speller.room = math.inf
    record |= {name: speller.spell(getattr(capsule, name), name) for name in sorted(plain)}
    for name in ("settings", "generators"):
        whole = getattr(capsule, name)
        entries = {f.name: getattr(whole, f.name) for f in fields(whole)}
        record[name] = speller.spell(entries, name)
    record["model"] = [
        [name, speller.spell(tensor, f"model.{name}")] for name, tensor in capsule.model.items()
    ]
    return record


def read(record: Mapping[str, Any], regions: list[Tensor]) -> Capsule:
    """The capsule that a record spells; raises `UnfitError` where it spells none."""
    views, tensors = record.get("views"), record.get("tensors")
    if not isinstance(views, list) or not isinstance(tensors, list):
        raise UnfitError("its record has no list of views and tensors")
    reader = Reader([read_view(view) for view in views], tensors, regions)
    known = {
        field.name: reader.read(record[field.name])
        for field in fields(Capsule)
        if field.name in record and field.name not in ("model", "settings", "generators")
    }
    known["model"] = _model(reader, record.get("model"))
    known["settings"] = _settings(reader.read(record.get("settings")))
    known["generators"] = _generators(reader.read(record.get("generators")))
    _check_fields(Capsule, known)
    return Capsule(**known)


def _model(reader: Reader, nodes: Any) -> dict[str, Tensor]:
    """Parameters and buffers; one that could not be stored is left out, and is named elsewhere."""
    model = reader.read(["dict", *nodes] if isinstance(nodes, list) else None)
    if not isinstance(model, dict):
        raise UnfitError("its record has no list of parameters")
    return {name: value for name, value in model.items() if isinstance(value, Tensor)}


def _settings(values: Any) -> Settings:
    known = _known(Settings, values)
    dtypes = [known.get("default_dtype", "float32"), *(d for *_, d in known.get("autocast", ()))]
    if not all(d in DTYPES and DTYPES[d].is_floating_point for d in dtypes):
        raise UnfitError(f"its settings name the dtypes {', '.join(map(repr, dtypes))[:80]}")
    if known.get("precision", "highest") not in PRECISIONS:
        raise UnfitError(f"its settings name the precision {known['precision'][:40]!r}")
    if not 1 <= known.get("threads", 1) <= MOST_THREADS:
        raise UnfitError(f"its settings name {known['threads']} threads")
    return Settings(**known)


def _generators(values: Any) -> Generators:
    """States of generators, each tried on a generator of its own."""
    known = _known(Generators, values)
    numbers = known["numbers"]
    is_twister = len(numbers) == 5 and numbers[0] == "MT19937" and numbers[1].size == _WORDS
    if not is_twister or type(numbers[2]) is not int or not 0 <= numbers[2] <= _WORDS:
        raise UnfitError("its state of numpy's generator is none")
    for state in (known["cpu"], *known["devices"]):
        if state.dtype != torch.uint8 or state.dim() != 1 or state.numel() > _MOST_STATE:
            raise UnfitError("its state of torch's generator is none")
    try:
        random.Random().setstate(known["python"])  # noqa: S311 - no secret is made of it
        RandomState().set_state(numbers)
        torch.Generator().set_state(known["cpu"])
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise UnfitError(f"its states of the generators are none ({_reason(error)})") from None
    return Generators(**known)


def _known(record: Any, values: Any) -> dict[str, Any]:
    """The fields of a record that are known here; what else a newer nanhunt wrote is left."""
    if not isinstance(values, dict):
        raise UnfitError(f"its record has no {record.__name__.lower()}")
    known = {f.name: values[f.name] for f in fields(record) if f.name in values}
    _check_fields(record, known)
    return known


def _check_fields(record: Any, known: Mapping[str, Any]) -> None:
    hints = get_type_hints(record)
    for name, hint in hints.items():
        if name in known and not _is(known[name], hint):
            raise UnfitError(f"its {name} is not what a {record.__name__.lower()} has there")
    missing = [name for name in ("python", "numbers", "cpu", "model", "batch") if name in hints]
    for name in missing:
        if name not in known:
            raise UnfitError(f"its record has no {name}")


def _is(value: Any, hint: Any) -> bool:  # noqa: PLR0911 - one for each kind of hint
    """Whether a value is of an annotation."""
    origin, arms = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_is(value, arm) for arm in arms)
    if origin is tuple:
        if not isinstance(value, tuple) or (arms[-1] is not Ellipsis and len(arms) != len(value)):
            return False
        each = arms[:1] * len(value) if arms[-1] is Ellipsis else arms
        return all(map(_is, value, each))
    if origin is Mapping:
        key, item = arms
        return isinstance(value, dict) and all(
            _is(k, key) and _is(v, item) for k, v in value.items()
        )
    if hint in (int, float, bool, str, types.NoneType):
        return type(value) is hint or (hint is float and type(value) is int)
    return isinstance(value, hint)


def _reason(error: BaseException) -> str:
    """What went wrong in one line, without the name of the file."""
    words = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    line = " ".join(words.split())[:200]
    return line[:1].lower() + line[1:]
