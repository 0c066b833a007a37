"""Reference: concentrated maximum likelihood with known K, one scene at a time.

A coarse grid with orthogonal least squares for the start, a simplex for the rest. Slow, plain and
apart from the rest on purpose: it is what faster estimates are measured against.

Shapes: N elements, M antennas, L snapshots, K sources.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import minimize

from ris_model.cells import Cells, lay_cells
from ris_model.config import DetectorSize
from ris_model.estimate.bound import widen
from ris_model.estimate.field import Measurements
from ris_model.estimate.fit import bound_places
from ris_model.estimate.search import Candidates, gather_candidates, score_candidates
from ris_model.geometry import steer_places

# Cells of the coarse grid along u_x, u_y and 1/r.
_GRID = (19, 13, 8)
# Edge of the first simplex in (u_x, u_y, 1/r).
_SIMPLEX = (0.02, 0.02, 0.05)
_CALLS = 400  # of the cost, per source
_TOLERANCE = 1e-5


def fit_reference(measurements: Measurements, *, sources: int) -> torch.Tensor:
    """Fit K sources to each scene, K known.

    Start: the cell of least cost beside those found so far. Then Nelder and Mead's simplex
    (Comput. J. 7, 1965) on the cost sum_l |y_l|^2 - |P_l y_l|^2 over (u_x, u_y, 1/r) of all K.

    Args:
        measurements: B scenes.
        sources: K.

    Returns:
        places [B, K, 3] float64.
    """
    exact = widen(measurements)
    size = DetectorSize(*_GRID, channels=0, blocks=0)
    cells = lay_cells(measurements.scenario, size)
    grid = cells.list_places(exact.positions)
    found = [
        _fit_scene(exact.select(torch.tensor([i])), grid, cells, sources)
        for i in range(exact.scenes)
    ]
    return torch.stack(found)


def _fit_scene(
    scene: Measurements,
    grid: torch.Tensor,
    cells: Cells,
    sources: int,
) -> torch.Tensor:
    """Places [K, 3] of one scene."""
    start = _start_on_grid(scene, gather_candidates(scene, grid[None]), cells, sources)
    operator, y = scene.operator[0].numpy(), scene.y[0].numpy()
    low, high = (np.tile(bound.numpy(), sources) for bound in bound_places(scene.scenario))
    world = scene.scenario

    def cost(x: np.ndarray) -> float:
        places = torch.from_numpy(np.clip(x, low, high)).view(-1, 3)
        rows, _ = steer_places(
            scene.positions, places, wavenumber=world.wavenumber, model=world.steering
        )
        return measure_cost(rows.numpy() @ operator, y)

    first = start.flatten().numpy()
    edges = np.diag(np.tile(_SIMPLEX, sources))
    options = {
        "initial_simplex": np.vstack((first, first + edges)),
        "maxfev": _CALLS * sources,
        "xatol": _TOLERANCE,
        "fatol": 1e-9 * float(np.square(np.abs(y)).sum()),
    }
    # the stubs know of no array for the first simplex
    result = minimize(cost, first, method="Nelder-Mead", options=options)  # type: ignore[call-overload]
    return torch.from_numpy(np.clip(result.x, low, high)).view(-1, 3)


def _start_on_grid(
    scene: Measurements,
    candidates: Candidates,
    cells: Cells,
    sources: int,
) -> torch.Tensor:
    """Cells found one after the other by orthogonal least squares, [K, 3]."""
    found = candidates.places[:, :0]
    for _ in range(sources):
        best = candidates.pick(score_candidates(scene, candidates, found), 1, cells)
        found = torch.cat((found, best), dim=1)
    return found[0]


def measure_cost(responses: np.ndarray, y: np.ndarray) -> float:
    """What least squares leaves of y [M, L] with responses [K, M L], one symbol per snapshot."""
    g = responses.reshape(len(responses), *y.shape).transpose(2, 1, 0)  # [L, M, K]
    basis, _ = np.linalg.qr(g)
    inside = np.einsum("lmk,ml->lk", basis.conj(), y)
    return float(np.square(np.abs(y)).sum() - np.square(np.abs(inside)).sum())
