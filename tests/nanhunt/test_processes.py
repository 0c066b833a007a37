"""Several processes, seen from one of them: the others are what they have written down."""

import pytest
import torch
from torch import distributed

from nanhunt import processes, store
from nanhunt.launch import company
from nanhunt.launch.company import Company
from nanhunt.records import Finding, Report

FINE, BAD = [torch.ones(2)], [torch.tensor([torch.nan])]
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


def report_of(cause):
    return Report("net", 0, "culprit", culprits=(Finding("forward", "aten::log", cause=cause),))


def test_a_loss_asks_for_losses_only(stand_at):
    """Rank 1 has passed its loss and waits in its backward; rank 2 says nothing."""
    stand_at(1)
    Company().note_loss(7, FINE)
    stand_at(2)
    Company().note_loss(7, BAD)
    Company().note_gradients(6, FINE)
    stand_at(0)
    here = Company()
    here.note_gradients(6, FINE)
    merged = here.merge(report_of("domain_error"), 7)
    assert [row.state for row in merged.ranks] == ["culprit", "finite", "missing"]
    assert here.tells


def test_gradients_ask_for_gradients(stand_at):
    """A loss that was passed is not enough then."""
    stand_at(1)
    Company().note_loss(7, FINE)
    stand_at(2)
    Company().note_gradients(8, FINE)  # it is further already
    stand_at(0)
    here = Company()
    here.note_loss(7, FINE)
    merged = here.merge(report_of("domain_error"), 7)
    assert [row.state for row in merged.ranks] == ["culprit", "missing", "finite"]


def test_the_lowest_that_found_something_tells(stand_at):
    """The others wait for it, and hold the same report."""
    stand_at(1)
    processes.write_down("nanhunt/run/found/7", store.dump(report_of("received_from_another_rank")))
    processes.write_down("nanhunt/run/told/7", "told")
    stand_at(0)
    Company().note_gradients(7, FINE)
    stand_at(2)
    here = Company()
    merged = here.merge(report_of("domain_error"), 7)
    assert (merged.rank, [row.state for row in merged.ranks]) == (
        2,
        ["finite", "received", "culprit"],
    )
    assert not here.tells
    here.end_telling(7)


def test_a_store_that_is_gone(stand_at, monkeypatch):
    """The report stays that of one rank, and nothing is raised."""

    def gone():
        raise distributed.DistNetworkError("connection reset")

    monkeypatch.setattr(processes, "_store", gone)
    stand_at(0)
    here = Company()
    here.note_loss(7, FINE)
    merged = here.merge(report_of("domain_error"), 7)
    here.end_telling(7)
    assert [row.state for row in merged.ranks] == ["culprit", "missing", "missing"]


def test_alone_nothing_is_asked():
    """Nor written."""
    here = Company()
    here.note_loss(1, FINE)
    assert here.tells
    assert here.agree(FINE, is_bad=True)
    assert not here.agree(FINE, is_bad=False)
    here.end_telling(1)
