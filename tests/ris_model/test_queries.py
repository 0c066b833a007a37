"""Queries: peaks of a heat map that were compared with each other."""

from dataclasses import fields, replace

import pytest
import torch

from ris_model.cells import lay_cells
from ris_model.config import PRESETS, apply_profile
from ris_model.data import draw_batch
from ris_model.network import Detector, decode
from ris_model.network.queries import SetHead
from ris_model.subject import assemble
from ris_model.training import safe_step

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = apply_profile(PRESETS["tiny"], "sound")
CONFIG = replace(PLAIN, detector=replace(PLAIN.detector, queries=4, query_width=16))
CELLS = lay_cells(CONFIG.scenario, CONFIG.detector)
BATCH = draw_batch(CONFIG.scenario, seed=0, split="train", index=0, size=6)


def detect(config=CONFIG, seed: int = 0):
    """An untrained network, what its backbone sees, and the detections without queries and with."""
    torch.manual_seed(seed)
    model = Detector(config).eval()
    features, levels = model.backbone(BATCH)
    with_queries = model.head(features, levels)
    queries, model.head.queries = model.head.queries, None
    plain = model.head(features, levels)
    return queries, features, plain, with_queries


def test_only_full_has_queries():
    """Two sources at most need none; five do."""
    assert [PRESETS[name].detector.queries for name in PRESETS] == [0, 0, 8]
    assert not any("queries" in name for name in Detector(PLAIN).state_dict())


def test_nearly_nothing_is_changed_to_start_with():
    """The same peaks in the same order, every number nearby."""
    _, _, plain, queried = detect()
    for field in fields(plain):
        before, after = getattr(plain, field.name), getattr(queried, field.name)
        assert before.shape == after.shape
        assert (before - after).abs().max() < 0.3
    assert not torch.equal(plain.heat, queried.heat)


def test_heat_changes_in_the_shadows_of_the_peaks_alone():
    """A peak that is no source takes its neighbours with it; everything else stays."""
    queries, features, plain, _ = detect()
    torch.nn.init.normal_(queries.write.weight, std=1.0)
    queried = queries(features, plain)
    index = CELLS.pick_peaks(plain.heat, 4)
    shadows = CELLS.cast_shadows(index)
    inside = shadows.any(1)
    assert inside.gather(1, index).all()
    assert torch.equal(queried.heat[~inside], plain.heat[~inside])
    assert (queried.heat != plain.heat)[inside].all()
    moved = (queried.offsets != plain.offsets).any(-1)
    assert torch.equal(moved, torch.zeros_like(moved).scatter(1, index, value=True))
    assert (queried.offsets - plain.offsets).abs().max() <= 1.0


def test_peaks_see_each_other():
    """What is written for one peak depends on where another one is."""
    queries, features, plain, _ = detect()
    torch.nn.init.normal_(queries.write.weight, std=1.0)
    first = CELLS.pick_peaks(plain.heat, 1)
    last = CELLS.pick_peaks(plain.heat, 4)[:, -1:]
    colder = replace(plain, heat=plain.heat.masked_fill(CELLS.cast_shadows(last)[:, 0], -9.0))
    one, other = (queries(features, d).offsets for d in (plain, colder))
    spread = first[..., None].expand(-1, -1, 3)
    assert ((one - other).gather(1, spread).abs().amax((-2, -1)) > 1e-4).all()


def test_gradients_reach_every_parameter():
    """Through heat, offsets, powers and K; all finite."""
    subject = assemble(CONFIG, "sound", seed=1)
    terms = subject.loss_fn(subject.model, BATCH)
    torch.stack(list(terms.values())).sum().backward()
    for name, parameter in subject.model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    written = subject.model.head.queries.write.weight.grad
    assert (written.abs().amax(-1) > 0).all()


def test_a_batch_is_learnt_by_heart():
    """The loss of one batch falls by more than half, and its sources are decoded."""
    subject = assemble(CONFIG, "sound", seed=0)
    losses = [safe_step(subject, BATCH).loss for _ in range(150)]
    assert losses[-1] < 0.5 * losses[0]
    found = decode(subject.model.eval()(BATCH), CELLS, 2).points
    gap = (found[:, :1, None, :2] - BATCH.points[:, None, :, :2]).abs().amax(-1)
    nearest = gap.masked_fill(~BATCH.active[:, None], 9.0).amin(-1)
    assert nearest.median() < 0.1


def test_shadow_is_that_in_which_no_second_peak_is_taken():
    """One peak alone: the cells that picking leaves out."""
    heat = torch.zeros(1, CELLS.total)
    index = CELLS.flatten(torch.tensor([[4.0, 3.0, 1.0]]))
    shadow = CELLS.cast_shadows(index[None])[0, 0]
    heat[0, index] = 1.0
    heat[0, shadow & (heat[0] == 0)] = 0.5
    picked = CELLS.pick_peaks(heat, 2)[0]
    assert picked[0] == index
    assert not shadow[picked[1]]
    assert isinstance(detect()[0], SetHead)
