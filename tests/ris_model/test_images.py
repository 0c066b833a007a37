"""Images: the fast forms beside the same sums written out snapshot by snapshot."""

from dataclasses import replace

import pytest
import torch

from ris_model.cells import lay_cells
from ris_model.config import PRESETS
from ris_model.data import Batch, draw_batch
from ris_model.geometry import place_elements, steer
from ris_model.images import Imaging, project_back, sharpen, whiten

TINY = PRESETS["tiny"]
CELLS = lay_cells(TINY.scenario, TINY.detector)
RIDGES = TINY.detector.ridges


def make_batch() -> Batch:
    """Two scenes in double precision."""
    batch = draw_batch(TINY.scenario, seed=4, split="train", index=0, size=2)
    wide = {name: getattr(batch, name).to(torch.complex128) for name in ("y", "h", "codes")}
    return replace(batch, **wide)


BATCH = make_batch()


def list_steering() -> torch.Tensor:
    """Steering vectors of all cells, [G, N]."""
    points = CELLS.resolve(CELLS.list_coordinates(torch.zeros((), dtype=torch.float64)))
    return steer(place_elements(TINY.scenario), points, wavenumber=TINY.scenario.wavenumber)


def measure(*, illuminated: bool) -> torch.Tensor:
    """Energies of the module, in double precision, without its scaling of the level."""
    imaging = Imaging(TINY.scenario, replace(TINY.detector, illuminated=illuminated), CELLS)
    exact = list_steering()
    outer = exact.conj()[:, :, None] * exact[:, None, :]
    imaging.table = (outer.real - outer.imag).flatten(1).mT if illuminated else exact.mT
    return imaging.measure(BATCH.y, BATCH.h, BATCH.codes)


def sum_naively(scene: int, ridge: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Back-projected energy, illumination and the back-projections, one snapshot at a time."""
    a, y, h, codes = list_steering(), BATCH.y[scene], BATCH.h[scene], BATCH.codes[scene]
    y = y / y.abs().square().mean().sqrt()
    load = ridge * (h @ h.mH).diagonal().sum().real / h.shape[0] * torch.eye(h.shape[0])
    energy, light, back = torch.zeros(len(a)), torch.zeros(len(a)), []
    for snapshot, code in zip(y, codes, strict=True):
        phi = h @ torch.diag(code)
        inverse = torch.linalg.inv(phi @ phi.mH + load)
        x = phi.mH @ inverse @ snapshot
        back.append(x)
        for cell, steering in enumerate(a):
            response = phi @ steering
            energy[cell] += (response.conj() @ inverse @ snapshot).abs().square()
            light[cell] += (response.conj() @ inverse @ response).real
    return energy, light, torch.stack(back)


def test_whitened_channel_is_that_of_every_snapshot():
    """Phi_l Phi_l^H = H H^H, so one factor whitens them all: W W^H (H H^H + load) = I."""
    white, v = whiten(BATCH.y, BATCH.h, ridge=0.1)
    for scene in range(2):
        h = BATCH.h[scene]
        gram = h @ h.mH
        for code in BATCH.codes[scene]:
            phi = h @ torch.diag(code)
            assert torch.allclose(phi @ phi.mH, gram)
        load = 0.1 * gram.diagonal().sum().real / 4 * torch.eye(4)
        wanted = h.mH @ torch.linalg.inv(gram + load)
        assert torch.allclose(v[scene].mH @ v[scene], wanted @ h)
        assert torch.allclose(white[scene] @ v[scene].conj(), (wanted @ BATCH.y[scene].mT).mT)


def test_images_equal_the_double_loop():
    """Both ridges, their quotients by the illumination, and the sharpened one."""
    fast = measure(illuminated=True)
    assert fast.shape == (2, TINY.detector.images, 252)
    for number, ridge in enumerate(RIDGES):
        energy, light, back = sum_naively(1, ridge)
        assert torch.allclose(fast[1, number].float(), energy, rtol=1e-4)
        assert torch.allclose(fast[1, 3 + number].float(), energy / light, rtol=1e-4)
    inner = back.conj() @ back.mT
    load = 0.3 * inner.diagonal().real.mean() * torch.eye(8)
    a = list_steering()
    field = a @ back.mH
    capon = (field.conj() * (field @ torch.linalg.inv(inner + load).mT)).real.sum(-1)
    assert torch.allclose(fast[1, 2], capon)


def test_summed_energies_equal_the_table():
    """The way without a table of N^2 G numbers gives the same images."""
    plain, table = measure(illuminated=False), measure(illuminated=True)
    assert plain.shape == (2, 3, 252)
    assert torch.allclose(plain, table[:, :3])


def test_sharpened_image_is_bounded_by_one():
    """a^H X^T (X^* X^T + load)^-1 X^* a <= |a|^2: a share of the cell's own energy."""
    x, _ = project_back(BATCH.y, BATCH.h, BATCH.codes, ridge=0.1)
    share = (sharpen(x, loading=0.3) @ list_steering().mT).abs().square().sum(-2)
    assert 0 < share.max() < 1


def test_image_of_one_source_peaks_on_it():
    """Without noise the hottest cell is next to the only source."""
    scenario = replace(PRESETS["small"].scenario, sources=1, snr_min=40.0, snr_max=40.0)
    cells = lay_cells(scenario, PRESETS["small"].detector)
    batch = draw_batch(scenario, seed=0, split="train", index=0, size=16)
    images, levels = Imaging(scenario, PRESETS["small"].detector, cells)(
        batch.y, batch.h, batch.codes
    )
    assert images.shape == (16, 5, 5, 9, 14)
    assert levels.shape == (16, 10)
    best = images[:, 4].flatten(1).argmax(-1)
    miss = cells.list_coordinates(images)[best] - cells.locate(batch.points[:, 0])
    assert (miss[:, :2].abs() < 1.0).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_do_not_notice_autocast(dtype):
    """Energies beyond 65504 stay what they are."""
    imaging = Imaging(TINY.scenario, TINY.detector, CELLS)
    batch = draw_batch(TINY.scenario, seed=4, split="train", index=0, size=2)
    plain = imaging(1e6 * batch.y, batch.h, batch.codes)
    with torch.autocast("cpu", dtype=dtype):
        under = imaging(1e6 * batch.y, batch.h, batch.codes)
    assert under[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


def test_silent_scene_has_finite_images():
    """No snapshot energy, no channel: no quotient by 0."""
    imaging = Imaging(TINY.scenario, TINY.detector, CELLS)
    for y, h in ((0 * BATCH.y, BATCH.h), (BATCH.y, 0 * BATCH.h)):
        images, levels = imaging(y, h, BATCH.codes)
        assert images.isfinite().all()
        assert levels.isfinite().all()
