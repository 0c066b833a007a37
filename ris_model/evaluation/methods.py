"""Methods: ways to estimate sources, side by side; each takes a batch and gives points.

Shapes: B scenes, K source slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ris_model.cells import Cells, lay_cells
from ris_model.checkpoint import load_model
from ris_model.config import Config
from ris_model.covariance import estimate_alternating
from ris_model.data import Batch
from ris_model.estimate.field import lay_out_batch
from ris_model.estimate.guess import guess_by_detection, guess_by_image, guess_together
from ris_model.estimate.localise import Located, Plan, localise
from ris_model.estimate.reference import fit_reference
from ris_model.estimate.spectra import Kind, scan, scan_ceiling
from ris_model.geometry import name_places
from ris_model.images import Imaging
from ris_model.network import Detector, decode


@dataclass(frozen=True, slots=True)
class Answer:
    """What a method says of a batch."""

    points: torch.Tensor  # [B, K, 3] (phi, theta, r) in rad, rad, m
    count: torch.Tensor  # [B]


Method = Callable[[Batch], Answer]


@dataclass(frozen=True, slots=True)
class Tools:
    """A configuration and what its methods share; without a network some are missing."""

    config: Config
    cells: Cells
    imaging: Imaging
    model: Detector | None = None
    plan: Plan = Plan()  # noqa: RUF009  frozen

    def locate(self, batch: Batch, *, network: bool, plan: Plan | None = None) -> Located:
        """Refine the candidates of the network or of the image."""
        plan = plan or self.plan
        count = plan.count_candidates(self.cells)
        if network:
            if self.model is None:
                msg = "there is no network to take candidates from"
                raise ValueError(msg)
            detection = self.model(batch)
            places = guess_by_detection(detection, self.cells, count)
            most = self.config.scenario.sources
            together = guess_together(detection, self.cells, most) if plan.together else None
        else:
            places = guess_by_image(self.imaging, batch, self.cells, count)
            together = None
        measurements = lay_out_batch(batch, self.config.scenario)
        return localise(measurements, places, plan=plan, cells=self.cells, together=together)


def gather_tools(config: Config, model: Detector | None = None, plan: Plan | None = None) -> Tools:
    """Prepare what the methods share."""
    cells = lay_cells(config.scenario, config.detector)
    imaging = Imaging(config.scenario, config.detector, cells)
    return Tools(config, cells, imaging, model, plan or Plan())


def load_tools(path: Path | str, plan: Plan | None = None) -> Tools:
    """Load a checkpoint of the sound profile; a ValueError says what else it is."""
    model, config = load_model(path)
    if not isinstance(model, Detector):
        msg = f"{path} holds an {type(model).__name__}; give a checkpoint of the sound profile"
        raise ValueError(msg)  # noqa: TRY004  the file is wrong, not the caller's types
    return gather_tools(config, model, plan)


def list_methods(tools: Tools, *, sources: int) -> dict[str, Method]:
    """Name -> method; `sources` is told only to those whose name says that K is known."""
    known = replace(tools.plan, limit=sources, threshold=-math.inf)
    world = tools.config.scenario
    moved = replace(tools.plan, reach=world.position_error * world.wavelength / 2)

    def refine(*, network: bool, plan: Plan | None = None) -> Method:
        def method(batch: Batch) -> Answer:
            found = tools.locate(batch, network=network, plan=plan)
            return Answer(name_places(found.places), found.count)

        return method

    def ask_network(batch: Batch) -> Answer:
        if tools.model is None:
            msg = "there is no network to ask"
            raise ValueError(msg)
        detection = tools.model(batch)
        found = decode(detection, tools.cells, tools.config.scenario.sources)
        return Answer(found.points, detection.k_logits.argmax(-1) + 1)

    methods: dict[str, Method] = {}
    if tools.model is not None:
        methods["network"] = ask_network
        methods["network + fit"] = refine(network=True)
        methods["network + fit, K known"] = refine(network=True, plan=known)
    methods["image + fit"] = refine(network=False)
    methods["image + fit, K known"] = refine(network=False, plan=known)
    if world.position_error:
        methods["image + fit, calibrated"] = refine(network=False, plan=moved)
    methods["ML, K known"] = _ask_reference(tools, sources)
    methods["MUSIC, K known"] = _ask_spectrum(tools, "music")
    methods["MUSIC on ALS, K known"] = _ask_alternating(tools, sources)
    methods["MVDR, K known"] = _ask_spectrum(tools, "mvdr")
    methods["MUSIC on R_true"] = _ask_ceiling(tools)
    return methods


def _ask_reference(tools: Tools, sources: int) -> Method:
    """Grid and simplex, K known."""

    def method(batch: Batch) -> Answer:
        places = fit_reference(lay_out_batch(batch, tools.config.scenario), sources=sources)
        count = torch.full((batch.samples,), sources)
        return Answer(name_places(places), count)

    return method


def _ask_spectrum(tools: Tools, kind: Kind) -> Method:
    """Scan of the sample covariance, K known."""

    def method(batch: Batch) -> Answer:
        found = scan(batch.r_samp, tools.config.scenario, kind=kind, count=batch.count)
        return Answer(found.points, found.count)

    return method


def _ask_alternating(tools: Tools, sources: int) -> Method:
    """MUSIC on the covariance of rank K by alternating least squares."""

    def method(batch: Batch) -> Answer:
        r = estimate_alternating(batch.y, batch.h, codes=batch.codes, sources=sources)
        found = scan(r, tools.config.scenario, kind="music", count=batch.count)
        return Answer(found.points, found.count)

    return method


def _ask_ceiling(tools: Tools) -> Method:
    """Scan of the noise-free label, K by its rank."""

    def method(batch: Batch) -> Answer:
        found = scan_ceiling(batch.r_true, tools.config.scenario)
        return Answer(found.points, found.count)

    return method
