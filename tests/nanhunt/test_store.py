"""A report there and back, and one clear sentence for everything that is no report."""

import json
import math
import os
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from nanhunt import store
from nanhunt.errors import StoreError
from nanhunt.records import Birth, Frame, Operand, OpEvent, Report, Run, Sink, TensorFacts, Trace

DOCS = Path(__file__).parents[2] / "docs" / "json.md"
CULPRIT_KEYS = (
    "phase op node formula_op file line function module term cause dtype evidence explanation"
)
MINIMAL = Report("s", 0, "healthy")


def message(call, *args):
    """The sentence of the StoreError that the call raises."""
    with pytest.raises(StoreError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def body(report):
    """What a report is in JSON."""
    return json.loads(store.dump(report), parse_constant=pytest.fail)


def edited(**changes):
    """A minimal report in JSON, with changes."""
    return json.dumps(body(MINIMAL) | changes)


# --- there and back ------------------------------------------------------------------------------


def test_round_trip(any_report, tmp_path):
    """What was saved is what is loaded, NaN and hostile text included."""
    path = tmp_path / "report.json"
    store.save(any_report, path)
    again = store.load(path)
    assert store.dump(again) == store.dump(any_report)
    assert repr(again) == repr(any_report)
    assert list(tmp_path.iterdir()) == [path]


def test_round_trip_is_equal(at_risk_report, tmp_path):
    """Without NaN, which equals nothing, the loaded report equals the saved one."""
    finite = replace(at_risk_report, runs=at_risk_report.runs[:2])
    store.save(finite, str(tmp_path / "report.json"))
    assert store.load(str(tmp_path / "report.json")) == finite


@pytest.mark.parametrize("value", [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 3e22])
def test_floats_are_exact(value):
    """A float comes back to the bit."""
    [run] = store.parse(store.dump(replace(MINIMAL, runs=(Run("native", loss=value),)))).runs
    assert run.loss.hex() == value.hex()


@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "inf")])
def test_nonfinite_is_text(value, text):
    """NaN and the infinities are written as text and read back as numbers."""
    report = replace(MINIMAL, runs=(Run("native", loss=value, scale=-value),))
    [run] = body(report)["runs"]
    assert (run["loss"], run["scale"]) == (text, {"nan": "nan", "inf": "-inf"}[text])
    [again] = store.parse(store.dump(report)).runs
    assert repr(again.loss) == repr(value)


def test_shape_of_the_file(incident_report):
    """The schema stands first, and each entry says what a reader without Python needs."""
    data = body(incident_report)
    assert data["schema"] == store.SCHEMA == 1
    assert list(data) == ["schema"] + [field.name for field in fields(Report)]
    assert all(set(CULPRIT_KEYS.split()) <= set(entry) for entry in data["culprits"])
    assert data["culprits"][0]["term"] == "align"
    assert [run["finite"] for run in data["runs"][:6]] == [False] * 5 + [True]
    assert (data["runs"][0]["nonfinite"], data["runs"][0]["parameters"]) == (64, 85)
    assert [entry["cures"] for entry in data["ablations"]] == [False, True, False, False]
    assert store.dump(incident_report).isascii()


def test_trace_round_trip():
    """The same code keeps any record: here one with a mapping and values of every kind."""
    facts = TensorFacts((2, 3), "float32", nan=1)
    operand = Operand("self", facts, smallest=-1.0, at=(0.0, math.inf))
    birth = Birth(0, 1, "nan and inf", ((0, 1),), operands=(operand,), scalars=(("p", 0.5),))
    event = OpEvent(
        3, "forward", "aten::log", (facts,), (facts,), frame=Frame("a.py", 1, "f"), birth=birth
    )
    trace = Trace((event,), (Sink("loss", "loss", facts),), owners={7: ("align",), 8: ()}, loss=1.0)
    text = json.dumps(store._encode(trace, "trace"))
    assert store._decode_record(json.loads(text), Trace, "") == trace


def test_missing_fields_take_defaults():
    """A file of an older nanhunt lacks fields: they take their defaults."""
    text = '{"schema": 1, "subject": "s", "batch": 0, "verdict": "healthy"}'
    assert store.parse(text) == MINIMAL


def test_unknown_keys_are_ignored():
    """A file of a newer nanhunt has fields that this one does not know."""
    assert store.parse(edited(news={"a": [1]}, threads=4)) == replace(MINIMAL, threads=4)


def test_derived_values_are_ignored(incident_report):
    """What derives from other fields is not believed when read."""
    data = body(incident_report)
    data["culprits"][0]["term"] = "another"
    data["runs"][0]["finite"] = "perhaps"
    assert store.dump(store.parse(json.dumps(data))) == store.dump(incident_report)


@dataclass(frozen=True)
class Newer:
    """A record with kinds of fields that no record has yet."""

    either: int | str
    flags: Mapping[str, bool]
    numbers: Mapping[int, float] | None = None


def test_other_kinds_of_fields():
    """Unions of several types and mappings need no code of their own."""
    record = Newer("a", {"x": True}, {1: math.inf})
    assert store._decode_record(store._encode(record, "r"), Newer, "") == record
    for wrong in ({"either": None}, {"flags": 3}, {"numbers": {"one": 1.0}}):
        data = {"either": 1, "flags": {}} | wrong
        with pytest.raises(store._UnfitError):
            store._decode_record(data, Newer, "")


# --- what is no report ---------------------------------------------------------------------------

GIVE = "; give a report that nanhunt saved"
AGAIN = "; save the report again"
OTHER = "; read it with the nanhunt that saved it, or save the report again"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", f"not JSON (Expecting value: line 1 column 1 (char 0)){AGAIN}"),
        (
            '{"schema": 1',
            f"not JSON (Expecting ',' delimiter: line 1 column 13 (char 12)){AGAIN}",
        ),
        ('{"schema": NaN}', 'NaN is not JSON; write it as text, such as "nan"'),
        ("[" * 100_000, "nested too deeply for a report; give one that nanhunt saved"),
        ("[1, 2]", f"holds a list of 2, not an object{GIVE}"),
        ("{}", f"has no `schema`{GIVE}"),
        *(
            (
                f'{{"schema": {schema}}}',
                f"has schema {schema} and this nanhunt reads schema 1{OTHER}",
            )
            for schema in ("2", "true", "1.0", '"1"')
        ),
        ('{"schema": 1}', f"`subject` is missing{GIVE}"),
        (edited(subject=3), f"`subject` is 3 instead of text{GIVE}"),
        (edited(batch="0"), f'`batch` is "0" instead of a whole number of 64 bits{GIVE}'),
        (edited(batch=True), f"`batch` is true instead of a whole number of 64 bits{GIVE}"),
        (
            edited(batch=2**63),
            f"`batch` is 9223372036854775808 instead of a whole number of 64 bits{GIVE}",
        ),
        (
            edited(verdict="fine"),
            '`verdict` is "fine" instead of one of "healthy", "culprit", "unexplained", "at_risk"'
            + GIVE,
        ),
        (
            edited(samples=[1]),
            f"`samples` is a list of 1 instead of a whole number of 64 bits{GIVE}",
        ),
        (
            edited(samples="x" * 50),
            f'`samples` is "{"x" * 38}… instead of a whole number of 64 bits or null{GIVE}',
        ),
        (edited(deterministic=1), f"`deterministic` is 1 instead of true or false or null{GIVE}"),
        (edited(notes="a"), f'`notes` is "a" instead of a list{GIVE}'),
        (edited(notes=["a", None]), f"`notes[1]` is null instead of text{GIVE}"),
        (edited(twins=[["a"]]), f"`twins[0]` is a list of 1 instead of a list of 2{GIVE}"),
        (edited(runs=[3]), f"`runs[0]` is 3 instead of an object{GIVE}"),
        (edited(runs=[{}]), f"`runs[0].variant` is missing{GIVE}"),
        (
            edited(seconds={}),
            f'`seconds` is an object of 0 instead of a number, "nan", "inf" or "-inf"{GIVE}',
        ),
        (
            edited(seconds="fast"),
            f'`seconds` is "fast" instead of a number, "nan", "inf" or "-inf"{GIVE}',
        ),
    ],
)
def test_refused_text(text, sentence, tmp_path):
    """Each text that is no report is refused with what is wrong and what would work."""
    assert message(store.parse, text) == f"the text: {sentence}"
    path = tmp_path / "r.json"
    path.write_text(text)
    assert message(store.load, path) == f"{path}: {sentence}"


@pytest.mark.parametrize("digits", ["1e999", "1" + "0" * 400, "1" * 5000])
def test_huge_numbers_are_refused(digits):
    """Numbers beyond a double are refused, not turned into infinities."""
    text = edited(seconds=12345.5).replace("12345.5", digits)
    assert re.search(r"`seconds` is |not JSON \(Exceeds the limit", message(store.parse, text))


def test_missing_file(tmp_path):
    """A file that is not there is named."""
    path = tmp_path / "no.json"
    assert message(store.load, path) == (
        f"{path}: cannot be read (no such file or directory){GIVE}"
    )


def test_folder(tmp_path):
    """A folder is not read."""
    assert message(store.load, tmp_path) == f"{tmp_path}: cannot be read (it is a folder){GIVE}"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_pipe(tmp_path):
    """A pipe is refused instead of waited for, and not replaced."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    assert message(store.load, path) == (f"{path}: cannot be read (it is not a regular file){GIVE}")
    assert "(it exists and is not a regular file)" in message(store.save, MINIMAL, path)
    assert path.is_fifo()


def test_not_utf8(tmp_path):
    """Bytes that are no text are refused with their place."""
    path = tmp_path / "r.json"
    path.write_bytes(b'{"a": "\xff"}')
    assert message(store.load, path) == f"{path}: not UTF-8 text (byte 7){GIVE}"


def test_too_large(tmp_path):
    """A file above 64 MiB is not parsed."""
    path = tmp_path / "r.json"
    with path.open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    assert message(store.load, path) == (
        f"{path}: cannot be read (it is larger than the 64 MiB that a report may have){GIVE}"
    )


def test_impossible_name():
    """A name that no file can have is refused on both ways."""
    assert message(store.load, "a\0b") == f"a\0b: cannot be read (embedded null byte){GIVE}"
    assert "cannot be written (" in message(store.save, MINIMAL, "a\0b")


def test_unreadable(tmp_path, monkeypatch):
    """A file that may not be read is refused with the system's reason."""
    path = tmp_path / "r.json"
    path.write_text(store.dump(MINIMAL))
    monkeypatch.setattr(Path, "open", _denied)
    assert message(store.load, path) == f"{path}: cannot be read (permission denied){GIVE}"


# --- saving --------------------------------------------------------------------------------------

FOLDER = "; give a file in a folder that exists and is writable"


def _denied(*_args, **_kwargs):
    raise PermissionError(13, "Permission denied")


def test_save_without_folder(tmp_path):
    """A folder that is not there is not made."""
    path = tmp_path / "no" / "r.json"
    assert message(store.save, MINIMAL, path) == (
        f"{path}: cannot be written (no such file or directory){FOLDER}"
    )
    assert not list(tmp_path.iterdir())


def test_save_onto_folder(tmp_path):
    """A folder is not replaced."""
    assert message(store.save, MINIMAL, tmp_path) == (
        f"{tmp_path}: cannot be written (it exists and is not a regular file){FOLDER}"
    )


@pytest.mark.parametrize("step", ["open", "fsync"])
def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch, step):
    """Where writing fails, the old file stays and nothing lies beside it."""
    path = tmp_path / "r.json"
    path.write_text("old")
    monkeypatch.setattr(os, step, _denied)
    assert message(store.save, MINIMAL, path) == (
        f"{path}: cannot be written (permission denied){FOLDER}"
    )
    monkeypatch.undo()
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_save_follows_links(tmp_path):
    """Saving to a link writes the file it points to."""
    (tmp_path / "link").symlink_to(tmp_path / "real")
    store.save(MINIMAL, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert store.load(tmp_path / "real") == MINIMAL


def test_unfit_record(tmp_path):
    """A value that JSON cannot hold is named, and no file is made."""
    report = replace(MINIMAL, runs=(Run("native", notes=({1},)),))
    assert message(store.save, report, tmp_path / "r.json") == (
        "report.runs[0].notes[0] is a set, which JSON cannot hold; "
        "a report holds text, numbers and records only"
    )
    assert not list(tmp_path.iterdir())


# --- mutations -----------------------------------------------------------------------------------


def scrambled(text, rng):
    """The text with a few characters changed, moved or lost."""
    chars = list(text)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(chars))
        stop = start + rng.choice((0, 1, 1, 5, 200))
        chars[start:stop] = rng.choice(("", "", '"', "[", "}", "9", "-", "null", "\x00", "\ud800"))
    return "".join(chars)


def test_mutations(incident_report, tmp_path, damage):
    """Whatever happens to a file, reading it gives a report or a StoreError."""
    rng = random.Random(7)  # noqa: S311
    text = store.dump(incident_report)
    path = tmp_path / "r.json"
    outcomes = set()
    for i in range(500):
        changed = json.dumps(damage(json.loads(text), rng)) if i % 2 else scrambled(text, rng)
        path.write_bytes(changed.encode("utf-8", "surrogatepass"))
        try:
            again = store.load(path)
        except StoreError as error:
            outcomes.add(str(error).startswith(f"{path}: "))
        else:
            outcomes.add(type(again))
    assert outcomes == {True, Report}


# --- the page for users --------------------------------------------------------------------------


def records(record):
    """A record and all the records inside it."""
    found = {record}
    for hint in get_type_hints(record).values():
        arms = [hint]
        while arms:
            arm = arms.pop()
            arms += get_args(arm)
            if is_dataclass(arm):
                found |= records(arm)
    return found


def test_docs_name_every_field():
    """The page about the file has a row for each field and each derived value."""
    text = DOCS.read_text(encoding="utf-8")
    for record in records(Report):
        _, section = text.split(f"\n## {record.__name__}\n", 1)
        section = section.split("\n## ")[0]
        names = [field.name for field in fields(record)] + list(store._DERIVED.get(record, {}))
        assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == names


def test_docs_example_is_real():
    """The example in the page is what `dump` writes."""
    [example] = re.findall(r"```json\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert store.dump(store.parse(example)) == example
