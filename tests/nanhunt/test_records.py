"""What derives from the records, and that nothing changes them."""

import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, is_dataclass

import pytest

from nanhunt import records
from nanhunt.records import (
    Ablation,
    Finding,
    Group,
    OpEvent,
    Report,
    Run,
    Sink,
    TensorFacts,
    Trace,
)

RECORDS = [r for r in vars(records).values() if isinstance(r, type) and is_dataclass(r)]
CLEAN, DIRTY = TensorFacts((2, 3), "float32"), TensorFacts((2, 3), "float32", 1, 2, 3)


def event(**changes):
    """A forward op, with changes."""
    given = {"index": 0, "phase": "forward", "op": "aten::exp", "inputs": (), "outputs": (CLEAN,)}
    return OpEvent(**given | changes)


def test_facts_count_what_is_not_finite():
    """NaN and both infinities count, and one of any kind is enough."""
    assert (DIRTY.nonfinite, DIRTY.is_finite, CLEAN.nonfinite, CLEAN.is_finite) == (6, False, 0, 1)
    for kind in ("nan", "posinf", "neginf"):
        assert not TensorFacts((1,), "float32", **{kind: 1}).is_finite


@pytest.mark.parametrize(("shape", "count"), [((), 1), ((2, 3), 6), ((4, 0), 0)])
def test_facts_know_the_number_of_elements(shape, count):
    """A scalar has one element, an empty tensor none."""
    assert TensorFacts(shape, "float32").numel == count


def test_event_is_finite_when_every_output_is():
    """One non-finite output is enough; an op without outputs is finite."""
    assert event(outputs=(CLEAN, CLEAN)).is_finite
    assert not event(outputs=(CLEAN, DIRTY)).is_finite
    assert event(outputs=()).is_finite


def test_event_names_each_parent_once():
    """Parents come in the order of the inputs."""
    assert event(sources=((7, -1), (), (2, 7))).parents == (7, -1, 2)


def test_trace_lists_nonfinite_sinks():
    """Only sinks that hold a non-finite value, in their order."""
    sinks = (
        Sink("loss", "loss", CLEAN),
        Sink("gradient", "w", DIRTY),
        Sink("gradient", "b", CLEAN),
    )
    assert [sink.name for sink in Trace((), sinks).nonfinite_sinks] == ["w"]
    assert (sinks[0].is_finite, sinks[1].is_finite) == (True, False)


@pytest.mark.parametrize(("terms", "word"), [((), None), (("a",), "a"), (("a", "b"), "a, b")])
def test_finding_names_its_terms_in_one_word(terms, word):
    """Without named terms there is no term."""
    assert Finding("forward", "aten::log", terms=terms).term == word


def test_run_sums_its_groups():
    """Non-finite gradients and parameters over all groups."""
    run = Run("native", loss=1.0, groups=(Group("a", math.nan, 2, 3), Group("b", 1.0, 0, 4)))
    assert (run.nonfinite, run.parameters, run.is_finite) == (2, 7, False)


@pytest.mark.parametrize(
    ("changes", "finite"),
    [
        ({}, True),
        ({"loss": math.nan}, False),
        ({"loss": -math.inf}, False),
        ({"groups": (Group("a", 1.0, 1, 2),)}, False),
        ({"groups": (Group("a", math.inf, 0, 2),)}, True),
        ({"stepped_nonfinite": 1}, False),
        ({"raised": "ValueError"}, False),
    ],
)
def test_run_is_finite(changes, finite):
    """It ran, and loss, gradients and stepped parameters are finite; a norm may overflow."""
    assert Run(**{"variant": "native", "loss": 1.0} | changes).is_finite is finite


@pytest.mark.parametrize(
    ("mode", "finite", "cures"),
    [("without", True, True), ("without", False, False), ("alone", True, False)],
)
def test_ablation_cures(mode, finite, cures):
    """Only taking something out cures; what is finite alone is merely not guilty."""
    assert Ablation(("a",), mode, requested=True, finite=finite).cures is cures


def test_report_knows_its_native_run():
    """It is the run of that name from which nothing was taken out."""
    native, ablated = Run("native", loss=1.0), Run("native", ("a",), loss=2.0)
    assert Report("s", 0, "healthy", runs=(Run("fp64"), ablated, native)).native is native
    assert Report("s", 0, "healthy", runs=(ablated,)).native is None


@pytest.mark.parametrize("record", RECORDS)
def test_records_are_frozen(record):
    """No field of a record can be set, and no attribute added."""
    made = object.__new__(record)
    for name in (*(f.name for f in fields(record)), "other"):
        with pytest.raises((FrozenInstanceError, TypeError)):
            setattr(made, name, 1)
    assert not hasattr(made, "__dict__")


def test_records_need_nothing_but_the_standard_library():
    """They can be imported with every other package out of reach."""
    code = (
        "import sys, nanhunt.records; "
        "tops = {m.partition('.')[0] for m in sys.modules} - sys.stdlib_module_names; "
        "print(sorted(t for t in tops if t in ('torch', 'numpy', 'rich', 'typer')))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.stdout, ran.stderr) == ("[]\n", "")
