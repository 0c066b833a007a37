"""Prediction: a user's own measurements, from an npz file to sources with error bars."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ris_model.config import Scenario
from ris_model.data import Batch
from ris_model.estimate.bars import estimate_bars
from ris_model.estimate.field import lay_out_batch
from ris_model.evaluation.methods import Tools
from ris_model.geometry import name_places

_NAMES = ("y", "H", "codes")
# How far the modulus of a code may be from 1.
_MODULUS_SLACK = 1e-3
_EXPECTED = (
    "y [L, M] or [n, L, M], H [M, N] or [n, M, N], codes [L, N] or [n, L, N], complex or with a "
    "last dimension of real and imaginary part"
)


@dataclass(frozen=True, slots=True)
class Readings:
    """Scenes as a file holds them, complex64."""

    y: torch.Tensor  # [B, L, M]
    h: torch.Tensor  # [B, M, N]
    codes: torch.Tensor  # [B, L, N]


@dataclass(frozen=True, slots=True)
class Found:
    """One source of one scene."""

    scene: int
    point: tuple[float, float, float]  # (phi, theta, r) in rad, rad, m
    bar: tuple[float, float, float]  # standard deviations
    snr_db: float  # of this source, at the antennas, over the noise
    coherent: bool


def read_file(path: Path | str, scenario: Scenario) -> Readings:
    """Read y, H and codes from an npz file.

    H and codes may be given once for all scenes. L and M are the file's own; N must be that of
    the surface that the model was trained for.

    Raises:
        ValueError: with what is wrong, what came and what would do.
    """
    arrays = _load(path)
    y, h, codes = (_read_complex(arrays[name], name, path) for name in _NAMES)
    elements = scenario.elements
    if h.shape[-1] != elements or codes.shape[-1] != elements:
        msg = (
            f"{path}: H has {h.shape[-1]} and codes have {codes.shape[-1]} elements in their last "
            f"dimension; this model is for {scenario.columns} x {scenario.rows} = {elements}"
        )
        raise ValueError(msg)
    if h.shape[-2] != y.shape[-1] or codes.shape[-2] != y.shape[-2]:
        msg = (
            f"{path}: y {_show(y)} does not fit H {_show(h)} and codes {_show(codes)}; y is "
            "[n, L, M] with H [n, M, N] and codes [n, L, N]"
        )
        raise ValueError(msg)
    scenes = y.shape[0]
    for name, array in (("H", h), ("codes", codes)):
        if array.shape[0] not in {1, scenes}:
            msg = f"{path}: {name} has {array.shape[0]} scenes, y has {scenes}; give 1 or {scenes}"
            raise ValueError(msg)
    off = float(np.abs(np.abs(codes) - 1.0).max())
    if off > _MODULUS_SLACK:
        msg = f"{path}: codes have moduli up to {off:.3g} away from 1; give pure phases"
        raise ValueError(msg)
    y, h = (_level(a, name, path) for name, a in (("y", y), ("H", h)))
    parts = (np.broadcast_to(a, (scenes, *a.shape[1:])) for a in (y, h, codes))
    return Readings(*(torch.from_numpy(a.astype(np.complex64)) for a in parts))


def predict(tools: Tools, readings: Readings) -> list[Found]:
    """Locate the sources of every scene, in the order of their scenes."""
    batch = _stand_in(readings, tools.config.scenario)
    with torch.inference_mode():
        answer = tools.locate(batch, network=tools.model is not None)
        measurements = lay_out_batch(batch, tools.config.scenario)
        bars = estimate_bars(measurements, answer)
        fields = measurements.respond(measurements.steer(answer.places))
        level = fields.abs().square().mean((-2, -1)) * answer.power / answer.noise[:, None]
        points = name_places(answer.places.double())
    found = []
    for scene, count in enumerate(answer.count.tolist()):
        for k in range(count):
            phi, theta, r = points[scene, k].tolist()
            a, b, c = bars[scene, k].tolist()
            snr = 10 * float(level[scene, k].log10())
            coherent = bool(answer.coherent[scene])
            found.append(Found(scene, (phi, theta, r), (a, b, c), snr, coherent))
    return found


def _level(array: np.ndarray, name: str, path: Path | str) -> np.ndarray:
    """Scale every scene to a largest modulus of 1, whatever its unit; places and SNR stay."""
    # the parts first: the modulus of two of them may be beyond what a number can be
    parts = np.maximum(np.abs(array.real), np.abs(array.imag)).astype(np.float64)
    largest = parts.max(axis=(-2, -1), keepdims=True)
    empty = np.flatnonzero(largest == 0)
    if len(empty):
        msg = f"{path}: {name} of scene {empty[0]} is all zero; give scenes in which something came"
        raise ValueError(msg)
    scaled: np.ndarray = array / largest
    return scaled


def _load(path: Path | str) -> dict[str, np.ndarray]:
    """Arrays of an npz file, without executing anything that it may hold."""
    if Path(path).is_file() and not zipfile.is_zipfile(path):
        msg = f"{path} is no npz file; write one with numpy.savez, with {_EXPECTED}"
        raise ValueError(msg)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        msg = f"there is no file {path}; give an npz file with {_EXPECTED}"
        raise ValueError(msg) from None
    except (OSError, ValueError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        msg = f"{path} cannot be read as npz ({error}); give {_EXPECTED}"
        raise ValueError(msg) from None
    if "H" not in arrays and "h" in arrays:
        arrays["H"] = arrays.pop("h")
    missing = [name for name in _NAMES if name not in arrays]
    if missing:
        have = ", ".join(sorted(arrays)) or "nothing"
        msg = f"{path} has no {', '.join(missing)} but {have}; give {_EXPECTED}"
        raise ValueError(msg)
    return arrays


def _read_complex(array: np.ndarray, name: str, path: Path | str) -> np.ndarray:
    """Return [n, *, *] complex, finite, from any of the shapes that are taken."""
    shape = array.shape
    if not np.iscomplexobj(array) and array.ndim in {3, 4} and shape[-1] == 2:
        array = array[..., 0] + 1j * array[..., 1]
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or not np.iscomplexobj(array) or not array.size:
        msg = f"{path}: {name} is {array.dtype} of shape {list(shape)}; give {_EXPECTED}"
        raise ValueError(msg)
    wrong = int((~np.isfinite(array)).sum())
    if wrong:
        msg = f"{path}: {name} holds {wrong} numbers that are not finite; give finite ones"
        raise ValueError(msg)
    return array


def _show(array: np.ndarray) -> str:
    """Shape as text."""
    return str(list(array.shape))


def _stand_in(readings: Readings, scenario: Scenario) -> Batch:
    """A batch of measurements whose labels nobody knows: zeros, and NaN for the SNR."""
    y, h, codes = readings.y, readings.h, readings.codes
    scenes, snapshots, _ = y.shape
    empty = torch.zeros(scenes, scenario.sources)
    unknown = torch.full((scenes,), torch.nan)
    nothing = torch.zeros(scenes, 1, 1, dtype=y.dtype)
    return Batch(
        y=y,
        h=h,
        codes=codes,
        ptr=empty.repeat(1, 3),
        count=torch.zeros(scenes, dtype=torch.int64),
        power=empty,
        symbols=empty[:, None].expand(-1, snapshots, -1).to(y.dtype),
        noise_variance=unknown,
        snr_db=unknown,
        source_snr_db=empty,
        r_true=nothing,
        r_samp=nothing,
    )
