"""Reading a configuration: what is wrong in it gets one sentence with the nearest right word."""

import datetime as dt
import difflib
import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanhunt.errors import UsageError
from nanhunt.gate.policy import Allowance, Bounds, Gated, Limits, Policy
from nanhunt.gate.table import BY_ID

INIT = "`nanhunt init` writes one to start from"
_GATED = ("options", "batches", "seeds", "variants", "ablations", "device", "weights", "thresholds")
_TOP = ("subject", *_GATED, "subjects", "allow", "baseline", "require")
_ALLOW = ("check", "reason", "until", "name", "subject", "variant")
_LIMITS = ("norm", "norms", "ratio", "ratios", "baseline_factor", "fp64")
_PAIR = "[smallest, largest], two numbers"


def find_policy(config: Path | None) -> Policy:
    """The policy of a file, else of the nearest `pyproject.toml`.

    Raises:
        UsageError: there is none, or it is wrong; the sentence says what and what would work.
    """
    if config is not None:
        return read_policy(config)
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "pyproject.toml").is_file():
            return read_policy(folder / "pyproject.toml")
    raise UsageError(
        f"there is nothing to gate: no pyproject.toml in {Path.cwd().name or '/'} or above; {INIT}"
    )


def read_policy(file: Path) -> Policy:
    """The policy that a TOML file holds: under `[tool.nanhunt]`, or, in a file of its own, bare.

    Raises:
        UsageError: the file cannot be read, or something in it is wrong.
    """
    try:
        text = file.read_text(encoding="utf-8")
        whole = tomllib.loads(text)
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{file} cannot be read as TOML: {told}; {INIT}") from None
    tool = whole.get("tool", {})
    if isinstance(tool, dict) and "nanhunt" in tool:
        table, name = tool["nanhunt"], "[tool.nanhunt]"
    elif file.name == "pyproject.toml" or not whole:
        raise UsageError(f"{file} has no [tool.nanhunt], so there is nothing to gate; {INIT}")
    else:
        table, name = whole, "the configuration"
    if not isinstance(table, dict):
        raise UsageError(f"{file}: tool.nanhunt is to be a table; got {table!r}")
    top = _Table(file.name, name, table, text.splitlines())
    top.check(_TOP)
    return Policy(
        file=file.absolute(),
        subjects=_subjects(top),
        allowances=tuple(_allowance(one) for one in top.tables("allow")),
        required=top.names("require", ()),
        baseline=top.take("baseline", "a file name", _is_name, None),
    )


@dataclass(frozen=True, slots=True)
class _Table:
    """One table of the file, which knows what it is called."""

    file: str
    name: str
    values: Mapping[str, Any]
    lines: list[str]

    def check(self, known: Iterable[str]) -> None:
        """Refuse a key that means nothing."""
        for key in self.values:
            if key not in known:
                raise self.wrong(f"has no key {key!r}; {_nearest(key, known)}")

    def wrong(self, what: str) -> UsageError:
        """The error for something in this table."""
        return UsageError(f"{self.file}: {self.name} {what}")

    def take(self, key: str, wanted: str, fits: Callable[[Any], bool], default: Any) -> Any:
        """A value that fits, or the default where there is none."""
        if key not in self.values:
            return default
        value = self.values[key]
        if not fits(value):
            raise self.wrong(f"{key} is to be {wanted}; got {_shown(value)}")
        return value

    def names(self, key: str, default: tuple[str, ...]) -> tuple[str, ...]:
        """A list of names; of checks these must be ids."""
        found = tuple(self.take(key, "a list of names", _is_list_of(_is_name), default))
        for name in found if key == "require" else ():
            self.check_id(key, name)
        return found

    def check_id(self, key: str, name: str) -> None:
        """Refuse what is the id of no check."""
        if name not in BY_ID:
            raise self.wrong(f"{key}: no check is called {name!r}; {_nearest(name, BY_ID)}")

    def wholes(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers, or one of them."""
        value = self.values.get(key, 0)
        if _is_index(value):
            return (value,)
        wanted = "a list of whole numbers from 0 up"
        return tuple(self.take(key, wanted, lambda v: bool(v) and _is_list_of(_is_index)(v), ()))

    def table(self, key: str) -> "_Table":
        """The table under a key; an empty one where there is none."""
        value = self.take(key, "a table", lambda v: isinstance(v, dict), {})
        name = self.name.rstrip("]") + f".{key}]" if self.name[0] == "[" else f"[{key}]"
        return _Table(self.file, name, value, self.lines)

    def tables(self, key: str) -> list["_Table"]:
        """The tables of an array."""
        value = self.take(key, f"tables, each [[tool.nanhunt.{key}]]", _is_list_of(_is_dict), [])
        outer = self.name.rstrip("]") + f".{key}]" if self.name[0] == "[" else f"[{key}]"
        return [_Table(self.file, f"[{outer}] {i + 1}", v, self.lines) for i, v in enumerate(value)]

    def line_of(self, value: str) -> int:
        """The first line of the file that holds a text as a value."""
        marks = (f'"{value}"', f"'{value}'")
        found = (i for i, line in enumerate(self.lines, 1) if any(m in line for m in marks))
        return next(found, 1)


def _subjects(top: _Table) -> tuple[Gated, ...]:
    common = _gated(top, Gated(subject=""))
    found = []
    for one in top.tables("subjects"):
        one.check(("subject", *_GATED))
        found.append(_gated(one, common))
        if not found[-1].subject:
            raise one.wrong("names no subject; give subject = 'path/to/file.py:factory'")
    if common.subject and not found:
        found.append(common)
    if not found:
        raise top.wrong(
            "names no subject to gate; give subject = 'path/to/file.py:factory', or several as "
            "[[tool.nanhunt.subjects]]"
        )
    return tuple(found)


def _gated(table: _Table, common: Gated) -> Gated:
    """A subject; what its own table does not say is as in the common one."""
    subject = table.take("subject", "a name", _is_name, common.subject)
    own: dict[str, Any] = {"subject": subject, "line": table.line_of(subject)}
    for key in ("batches", "seeds"):
        if key in table.values:
            own[key] = table.wholes(key)
    for key in ("variants", "ablations"):
        if key in table.values:
            own[key] = table.names(key, ())
    own["device"] = table.take("device", "cpu or cuda", _is_name, common.device)
    own["options"] = {**common.options, **table.table("options").values}
    weights = table.take("weights", "a table of numbers", _is_table_of(_is_number), {})
    own["weights"] = {**common.weights, **weights}
    own["limits"] = _limits(table.table("thresholds"), common.limits)
    return replace(common, **own)


def _limits(table: _Table, common: Limits) -> Limits:
    table.check(_LIMITS)
    norm = table.take("norm", _PAIR, _is_pair, common.norm)
    norms = table.take("norms", f"a table of group = {_PAIR}", _is_table_of(_is_pair), {})
    ratios = table.take("ratios", f"a table of 'one/other' = {_PAIR}", _is_table_of(_is_pair), {})
    for key in ratios:
        if key.count("/") != 1:
            raise table.wrong(f"ratios: {key!r} is to name two groups, as 'backbone/head'")
    positive = "a number above 0"
    factor = table.take(
        "baseline_factor", "a number above 1", lambda v: _is_number(v) and v > 1, None
    )
    named = {(k.split("/")[0], k.split("/")[1]): _pair(v) for k, v in ratios.items()}
    return Limits(
        norm=_pair(norm) if norm is not None else None,
        norms={**common.norms, **{k: _pair(v) for k, v in norms.items()}},
        ratio=float(table.take("ratio", positive, _is_positive, common.ratio)),
        ratios={**common.ratios, **named},
        baseline_factor=float(factor or common.baseline_factor),
        fp64=float(table.take("fp64", positive, _is_positive, common.fp64)),
    )


def _allowance(table: _Table) -> Allowance:
    table.check(_ALLOW)
    for key in ("check", "reason", "until"):
        if key not in table.values:
            raise table.wrong(f"has no {key}; an allowance has a check, a reason and a date until")
    check = table.take("check", "the id of a check", _is_name, "")
    table.check_id("check", check)
    reason = table.take("reason", "a sentence", lambda v: _is_name(v) and bool(v.strip()), "")
    words = {
        key: table.take(key, "a name, which may hold * and ?", _is_name, "*")
        for key in ("name", "subject", "variant")
    }
    return Allowance(check, reason, _date(table), **words, line=table.line_of(reason))


def _date(table: _Table) -> dt.date:
    value = table.values["until"]
    if isinstance(value, str):
        try:
            value = dt.date.fromisoformat(value)
        except ValueError:
            value = None
    if isinstance(value, dt.datetime):
        value = value.date()
    if not isinstance(value, dt.date):
        given = _shown(table.values["until"])
        raise table.wrong(f"until is to be a date, as 2030-01-31; got {given}")
    return value


def _nearest(word: str, known: Iterable[str]) -> str:
    """The nearest of the known words, and all of them."""
    near = difflib.get_close_matches(word, list(known), 1, 0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known: {', '.join(known)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_pair(value: Any) -> bool:
    is_two = isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value))
    return is_two and value[0] <= value[1]


def _pair(value: Any) -> Bounds:
    return float(value[0]), float(value[1])


def _is_list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(fits, value))


def _is_table_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))
