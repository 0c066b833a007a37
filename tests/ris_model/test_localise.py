"""Localise: number and places of sources, with candidates of an image and of a heat map."""

import math
from dataclasses import replace

import pytest
import torch

from ris_model.cells import lay_cells
from ris_model.config import PRESETS
from ris_model.estimate.field import lay_out_batch
from ris_model.estimate.fit import refine
from ris_model.estimate.guess import guess_by_detection, guess_by_image, guess_together
from ris_model.estimate.localise import Plan, localise
from ris_model.geometry import name_places, place_points
from ris_model.images import Imaging
from ris_model.metrics import score, summarise
from ris_model.network import Detection

SMALL = PRESETS["small"]
CELLS = lay_cells(SMALL.scenario, SMALL.detector)
IMAGING = Imaging(SMALL.scenario, SMALL.detector, CELLS)


def locate(batch, plan=None, scenario=SMALL.scenario):
    """Locate the sources of a batch by its image; return the answer and its summary."""
    plan = plan or Plan()
    places = guess_by_image(IMAGING, batch, CELLS, plan.count_candidates(CELLS))
    with torch.inference_mode():
        answer = localise(lay_out_batch(batch, scenario), places, plan=plan, cells=CELLS)
    scores = score(
        batch.points,
        name_places(answer.places),
        count=batch.count,
        found_count=answer.count,
        snr_db=batch.snr_db,
    )
    return answer, summarise(scores)


@pytest.mark.parametrize("sources", [1, 2])
def test_number_and_places_at_10_db(draw_scenes, sources):
    """K is right in nearly all scenes, and no angle is far off."""
    batch = draw_scenes(SMALL.scenario, sources=sources, size=96, snr_min=10.0, snr_max=10.0)
    answer, figures = locate(batch)
    assert figures.right >= 0.98
    assert figures.outliers <= 0.02
    assert math.degrees(figures.median[0]) < 0.7
    assert not answer.coherent.any()
    ratio = answer.noise / batch.noise_variance
    assert ratio.median().item() == pytest.approx(1.0, abs=0.1)


def test_coherent_sources_are_told_and_found(draw_scenes):
    """One symbol for all snapshots: the covariance of the snapshots' sources has rank 1."""
    snr = {"snr_min": 15.0, "snr_max": 15.0}
    batch = draw_scenes(SMALL.scenario, sources=2, size=48, coherent=True, **snr)
    answer, figures = locate(batch)
    assert answer.coherent.float().mean() > 0.9
    assert figures.outliers <= 0.05
    _, blind = locate(batch, Plan(coherent=False))
    assert figures.success > blind.success


def test_empty_slots_and_untried_sources_are_marked(draw_scenes):
    """Slots beyond the count hold no power; the gain of the first source is not asked for."""
    batch = draw_scenes(SMALL.scenario, sources=1, size=16, snr_min=20.0, snr_max=20.0)
    answer, _ = locate(batch)
    assert answer.places.shape == (16, 2, 3)
    assert (answer.power[answer.count == 1, 1] == 0).all()
    assert answer.gain[:, 0].isnan().all()
    assert answer.gain[:, 1].isfinite().all()


def test_a_limit_is_kept(draw_scenes):
    """At most as many sources as are asked for; with no threshold, exactly as many."""
    batch = draw_scenes(SMALL.scenario, sources=2, size=16, snr_min=20.0, snr_max=20.0)
    assert locate(batch, Plan(limit=1))[0].count.tolist() == [1] * 16
    alone = draw_scenes(SMALL.scenario, sources=1, size=16, snr_min=20.0, snr_max=20.0)
    assert locate(alone, Plan(limit=2, threshold=-math.inf))[0].count.tolist() == [2] * 16


def test_three_sources_are_found_one_after_the_other(draw_scenes):
    """The limit is that of the scenario."""
    scenario = replace(SMALL.scenario, sources=3, correlation_max=0.3)
    snr = {"snr_min": 20.0, "snr_max": 20.0}
    batch = draw_scenes(scenario, sources=3, size=24, **snr)
    _, figures = locate(batch, scenario=scenario)
    assert figures.right >= 0.9
    assert figures.misses <= 0.05


def test_hottest_cells_are_the_first_candidates():
    """Moved by their own offsets."""
    heat = torch.zeros(2, CELLS.total)
    heat[0, 17], heat[1, 400] = 5.0, 5.0
    offsets = torch.full((2, CELLS.total, 3), 0.5)
    zeros = torch.zeros(2, CELLS.total)
    detection = Detection(heat, offsets, offsets, zeros, zeros[:, 0], zeros[:, :2])
    places = guess_by_detection(detection, CELLS, 8)
    expected = CELLS.list_places(heat)[[17, 400]] + 0.5 * torch.tensor(CELLS.step)
    assert places.shape == (2, 8, 3)
    assert torch.allclose(places[:, 0], expected)


def test_the_image_shows_the_source_among_its_brightest(draw_scenes):
    """A candidate lies next to the only source."""
    batch = draw_scenes(SMALL.scenario, sources=1, size=64, snr_min=10.0, snr_max=10.0)
    places = guess_by_image(IMAGING, batch, CELLS, 8)
    gap = (places - place_points(batch.points[:, :1])) / torch.tensor(CELLS.step)
    assert (gap[..., :2].abs().amax(-1).amin(-1) < 1.0).float().mean() > 0.95


def test_sources_seen_together_are_a_start_of_their_own(draw_scenes):
    """Where no candidate is near a source, a network's set of peaks still leads there."""
    batch = draw_scenes(SMALL.scenario, sources=2, size=24, snr_min=15.0, snr_max=15.0)
    truth = place_points(batch.points)
    blind = truth.new_tensor([[0.8, 0.45, 1.0], [-0.8, -0.45, 1.0]]).expand(24, -1, -1)
    plan = replace(Plan(), limit=2, threshold=-math.inf)
    errors = []
    for together in (None, truth + 0.03):
        with torch.inference_mode():
            answer = localise(
                lay_out_batch(batch, SMALL.scenario),
                blind,
                plan=plan,
                cells=CELLS,
                together=together,
            )
        gap = (answer.places[:, :, None, :2] - truth[:, None, :, :2]).norm(dim=-1)
        errors.append(gap.amin(-1).amax(-1))
    assert errors[0].median() > 0.1
    assert errors[1].quantile(0.9) < 0.05


def test_peaks_of_a_heat_map_are_taken_together():
    """Hottest first, none in the shadow of another, moved by their offsets."""
    heat = torch.zeros(1, CELLS.total)
    index = CELLS.flatten(torch.tensor([[3.0, 3.0, 2.0], [10.0, 6.0, 1.0], [4.0, 3.0, 2.0]]))
    heat[0, index] = torch.tensor([3.0, 2.0, 2.5])
    flat = torch.zeros(1, CELLS.total, 3)
    flat[0, index, 0] = 0.25
    unused = {"log_scales": flat, "log_power": heat, "log_noise": heat[0, :1], "k_logits": heat}
    found = guess_together(Detection(heat=heat, offsets=flat, **unused), CELLS, 2)
    wanted = torch.tensor([[3.25, 3.0, 2.0], [10.25, 6.0, 1.0]])
    wanted = wanted * torch.tensor(CELLS.step) + torch.tensor(CELLS.start)
    assert torch.allclose(found[0], wanted, atol=1e-6)


def test_a_swept_scene_makes_five_steps_like_any_other(draw_scenes, monkeypatch):
    """Every chain of steps has two of maximum likelihood and three with powers."""
    chains = []

    def watch(measurements, starts, *, steps, common=False, prior=None):
        places, cost = refine(measurements, starts, steps=steps, common=common, prior=prior)
        if prior is None:
            chains.append((steps, places))
        else:
            # the other sources of every start stand where maximum likelihood had left them
            assert steps == Plan().prior_steps
            rest = chains[-1][1].shape[2] - 1
            before = chains[-1][1].flatten(1, 2)
            known = (starts[..., None, :] == before[:, None, None]).all(-1).any(-1).sum(-1)
            swept.append(bool((known == rest).any()))
            assert (known >= rest).all()
        return places, cost

    swept = []
    monkeypatch.setattr("ris_model.estimate.localise.refine", watch)
    batch = draw_scenes(SMALL.scenario, sources=2, size=1, snr_min=-3.0, snr_max=-3.0)
    plan = replace(Plan(coherent=False), limit=2, sweep_below=math.inf, sweep_gain=-math.inf)
    locate(batch, plan)
    assert {steps for steps, _ in chains} == {Plan().likely_steps}
    assert Plan().likely_steps + Plan().prior_steps == 5
    assert any(swept)


def test_candidates_are_a_share_of_the_cells(draw_scenes):
    """64 of 3584 cells crowd around the strongest of five sources; a tenth of them does not."""
    full = PRESETS["full"]
    cells = lay_cells(full.scenario, full.detector)
    assert Plan().count_candidates(CELLS) == 64
    assert Plan().count_candidates(cells) == 358
    assert Plan(candidates=7).count_candidates(cells) == 7
    world = replace(full.scenario, codebook="random", power_law="equal", snr_min=15.0, snr_max=15.0)
    batch = draw_scenes(world, sources=5, size=12, correlation_max=0.5)
    imaging = Imaging(full.scenario, full.detector, cells)
    truth = cells.locate(batch.points)[:, :, None]
    seen = []
    for count in (64, 358):
        found = guess_by_image(imaging, batch, cells, count)
        near = (found - found.new_tensor(cells.start)) / found.new_tensor(cells.step)
        gap = (near[:, None] - truth)[..., :2].abs().amax(-1).amin(-1)
        seen.append((gap < 1.0).double().mean().item())
    assert seen[1] > 0.98
    assert seen[0] < seen[1]
