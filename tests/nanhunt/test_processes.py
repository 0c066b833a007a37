"""Several processes, seen from one of them: the others are what they have written down."""

import math

import pytest
import torch
from torch import distributed

from nanhunt import processes, store
from nanhunt.launch import company
from nanhunt.launch.company import Company
from nanhunt.records import Finding, Report, Run

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="needs torch.distributed")


@pytest.fixture
def stand_at(monkeypatch):
    """Be a rank of three, and have the others write."""
    shared = distributed.HashStore()
    monkeypatch.setattr(processes, "_store", lambda: shared)
    monkeypatch.setattr(processes, "are_several", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(company, "PATIENCE", 0.2)

    def at(rank):
        monkeypatch.setattr(processes, "rank_here", lambda: rank)

    return at


def report_of(cause, *, loss=1.0):
    found = Finding("forward", "aten::log", cause=cause)
    run = Run("native", loss=loss)
    return Report("net", 0, "culprit", culprits=(found,), runs=(run,))


def test_a_loss_asks_for_losses_only(stand_at):
    """Rank 1 has passed its loss and waits in its backward; rank 2 says nothing."""
    stand_at(1)
    Company().note_loss(7)
    stand_at(2)
    Company().note_gradients(6, is_bad=False)
    stand_at(0)
    here = Company()
    here.note_gradients(6, is_bad=False)
    merged = here.merge(report_of("domain_error", loss=math.nan), 7)
    assert [row.state for row in merged.ranks] == ["culprit", "finite", "missing"]
    assert here.tells


def test_gradients_ask_for_gradients(stand_at):
    """A loss that was passed is not enough then."""
    stand_at(1)
    Company().note_loss(7)
    stand_at(2)
    Company().note_gradients(8, is_bad=False)  # it is further already
    stand_at(0)
    here = Company()
    here.note_loss(7)
    merged = here.merge(report_of("domain_error"), 7)
    assert [row.state for row in merged.ranks] == ["culprit", "missing", "finite"]


def test_bad_gradients_without_a_report(stand_at):
    """Who told its culprit once keeps silent when it comes again."""
    stand_at(1)
    Company().note_gradients(7, is_bad=True)
    stand_at(2)
    Company().note_gradients(7, is_bad=False)
    stand_at(0)
    merged = Company().merge(report_of("received_from_another_rank"), 7)
    assert [row.state for row in merged.ranks] == ["received", "unexplained", "finite"]


def test_the_lowest_that_found_something_tells(stand_at):
    """The others wait for it, and hold the same report."""
    stand_at(1)
    processes.write_down("nanhunt/run/found/7", store.dump(report_of("received_from_another_rank")))
    processes.write_down("nanhunt/run/told/7", "told")
    stand_at(0)
    Company().note_gradients(7, is_bad=False)
    stand_at(2)
    here = Company()
    merged = here.merge(report_of("domain_error"), 7)
    assert (merged.rank, [row.state for row in merged.ranks]) == (
        2,
        ["finite", "received", "culprit"],
    )
    assert not here.tells
    here.end_telling(7)


def test_who_has_told_the_same_at_its_loss_is_left_to_it(stand_at):
    """The others meet it in their gradients afterwards, and do not tell it again."""
    stand_at(2)
    first = Company()
    stand_at(1)
    Company().note_loss(7)
    stand_at(0)
    here = Company()
    here.note_loss(7)
    stand_at(2)
    assert first.merge(report_of("domain_error", loss=math.inf), 7).rank == 2
    assert first.tells
    first.end_telling(7)
    stand_at(1)
    Company().note_gradients(7, is_bad=False)
    stand_at(0)
    merged = here.merge(report_of("received_from_another_rank"), 7)
    assert [row.state for row in merged.ranks] == ["received", "finite", "culprit"]
    assert not here.tells


def test_nobody_is_waited_for_twice_in_vain(stand_at, monkeypatch):
    """Until it says something again."""
    stand_at(0)
    here = Company()
    assert here.merge(report_of("domain_error"), 7).ranks[1].state == "missing"
    monkeypatch.setattr(company, "PATIENCE", 600.0)
    assert here.merge(report_of("domain_error"), 9).ranks[1].state == "missing"
    stand_at(1)
    Company().note_gradients(11, is_bad=False)
    stand_at(0)
    assert here.merge(report_of("domain_error"), 11).ranks[1].state == "finite"


def test_a_store_that_is_gone(stand_at, monkeypatch):
    """The report stays that of one rank, and nothing is raised."""

    def gone():
        raise distributed.DistNetworkError("connection reset")

    monkeypatch.setattr(processes, "_store", gone)
    stand_at(0)
    here = Company()
    here.note_loss(7)
    merged = here.merge(report_of("domain_error"), 7)
    here.end_telling(7)
    assert [row.state for row in merged.ranks] == ["culprit", "missing", "missing"]


def test_alone_nothing_is_asked():
    """Nor written."""
    here = Company()
    here.note_loss(1)
    assert here.tells
    assert here.agree([torch.ones(2)], is_bad=True)
    assert not here.agree([torch.ones(2)], is_bad=False)
    here.end_telling(1)
