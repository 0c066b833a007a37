"""Localise: sources one after the other, until one more is not worth it.

The candidates may come from a network's heat map or from an image; nothing here knows which.

Shapes: B scenes, S starts per scene, L snapshots, M antennas, K sources, J candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from ris_model.cells import Cells
from ris_model.estimate.calibrate import calibrate, doubt_offsets
from ris_model.estimate.evidence import weigh_evidence
from ris_model.estimate.field import Measurements, Prior
from ris_model.estimate.fit import refine
from ris_model.estimate.search import Candidates, gather_candidates, score_candidates

# Candidates of a grid that a tenth of would be few.
_LEAST_CANDIDATES = 64


@dataclass(frozen=True, slots=True)
class Plan:
    """How much work is done, and what a source must be worth."""

    # J, places that are looked at in each scene; 0 for a tenth of the cells, 64 at least. The
    # brightest cells crowd around the strongest sources: a fixed number of them misses the weaker.
    candidates: int = 0
    starts: int = 2  # candidates that a fit is tried from
    likely_steps: int = 2  # Levenberg-Marquardt steps of maximum likelihood
    prior_steps: int = 3  # then steps with the symbols' powers
    rounds: int = 2  # of the maximisation of each evidence
    # One source more must raise the logarithm of the evidence by this.
    threshold: float = 9.0
    limit: int = 0  # most sources that are sought; 0 for the scenario's K_MAX
    # One symbol for all snapshots is tried where it makes the first source more probable than this
    # below what new ones make it: sources that are still missing blur the difference.
    coherence: float = -35.0
    # Scenes whose weakest source is weaker, per antenna and snapshot over the noise, are swept,
    # which is to seek every source again beside the others, where it may decide their number.
    sweep_below: float = 3.0
    sweep_gain: float = 5.0
    coherent: bool = True  # whether coherent sources are thought of
    together: bool = True  # whether a fit is also tried from all peaks of a heat map at once
    # Where the elements may be off their places by up to this in x and y, m: they are then found
    # together with the sources. 0 takes the surface for what it is said to be.
    reach: float = 0.0

    def count_candidates(self, cells: Cells) -> int:
        """J for a grid."""
        return self.candidates or max(_LEAST_CANDIDATES, cells.total // 10)


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """K sources in each of B scenes, and how probable that is."""

    places: torch.Tensor  # [B, K, 3] (u_x, u_y, 1/r)
    evidence: torch.Tensor  # [B] natural logarithm
    power: torch.Tensor  # [B, K] of the symbols
    noise: torch.Tensor  # [B] sigma^2
    early: torch.Tensor  # [B, K, 3] where the sources were after the steps of maximum likelihood

    def select(self, index: torch.Tensor) -> Hypothesis:
        """Return the scenes of an index or a mask."""
        return Hypothesis(*(getattr(self, f.name)[index] for f in fields(self)))

    def replace_where(self, index: torch.Tensor, other: Hypothesis) -> Hypothesis:
        """Put another one's scenes at an index."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Hypothesis(*(mine.index_copy(0, index, new) for mine, new in pairs))


@dataclass(frozen=True, slots=True)
class Located:
    """The answer for B scenes: up to K_MAX sources each, in the order in which they were found."""

    places: torch.Tensor  # [B, K_MAX, 3] (u_x, u_y, 1/r); empty slots hold (0, 0, 1)
    count: torch.Tensor  # [B] int64
    coherent: torch.Tensor  # [B] bool, one symbol serves all snapshots
    power: torch.Tensor  # [B, K_MAX] of the symbols, 0 in empty slots
    noise: torch.Tensor  # [B] sigma^2
    evidence: torch.Tensor  # [B] of what was accepted, natural logarithm
    gain: torch.Tensor  # [B, K_MAX] that each source more brought; NaN where it was not tried

    def take(self, index: torch.Tensor, hypothesis: Hypothesis) -> None:
        """Write a hypothesis into the scenes of an index."""
        k = hypothesis.places.shape[1]
        self.places[index, :k] = hypothesis.places
        self.power[index, :k] = hypothesis.power
        self.noise[index] = hypothesis.noise
        self.evidence[index] = hypothesis.evidence
        self.count[index] = k


def localise(
    measurements: Measurements,
    places: torch.Tensor,
    *,
    plan: Plan,
    cells: Cells,
    together: torch.Tensor | None = None,
) -> Located:
    """Find how many sources there are, and where.

    One source is fitted, then another beside it, and so on while the evidence rises by the
    threshold. Where one symbol for all snapshots makes the first source more probable, the same is
    done for coherent sources, and the more probable of both answers is kept.

    Args:
        measurements: B scenes.
        places: [B, J, 3] candidates (u_x, u_y, 1/r), the likeliest J of a heat map or an image.
        plan: how much is done.
        cells: the grid that the candidates come from.
        together: [B, K_MAX, 3] what a network takes for sources, the surest first: a start of its
            own, since what is found one after the other may be wrong from the first one on.

    Returns:
        The answer, in the precision of the measurements.
    """
    candidates = gather_candidates(measurements, places, together)
    answer, one = _seek(measurements, candidates, plan=plan, cells=cells, common=False)
    if not plan.coherent:
        return answer
    alike = weigh_evidence(measurements, one.places[:, None], common=True, rounds=plan.rounds)
    index = (alike.value[:, 0] > one.evidence + plan.coherence).nonzero()[:, 0]
    if len(index):
        inside = measurements.select(index)
        # images add up energies over snapshots: of coherent sources they need not show the weaker
        everywhere = cells.list_places(places).expand(len(index), -1, -1)
        some = gather_candidates(inside, everywhere)
        other, _ = _seek(inside, some, plan=plan, cells=cells, common=True)
        better = other.evidence > answer.evidence[index]
        for f in fields(Located):
            getattr(answer, f.name)[index[better]] = getattr(other, f.name)[better]
    return answer


def _seek(
    measurements: Measurements,
    candidates: Candidates,
    *,
    plan: Plan,
    cells: Cells,
    common: bool,
) -> tuple[Located, Hypothesis]:
    """Seek sources one by one; return the answer and the first source of every scene."""
    limit = plan.limit or measurements.scenario.sources
    going = torch.arange(measurements.scenes, device=measurements.y.device)
    known = one = add_source(measurements, candidates, None, plan=plan, cells=cells, common=common)
    answer = _prepare(measurements, limit, common=common)
    if plan.reach:
        measurements, known = _settle(measurements, known, plan=plan, common=common)
    answer.take(going, known)
    for k in range(1, limit):
        more = add_source(measurements, candidates, known, plan=plan, cells=cells, common=common)
        weak = _measure_weakest(candidates, more, measurements) < plan.sweep_below
        worth = more.evidence - known.evidence > min(plan.sweep_gain, plan.threshold)
        index = (weak & worth).nonzero()[:, 0]
        if len(index):
            inside, some = measurements.select(index), candidates.select(index)
            again = more.select(index)
            again = sweep(inside, some, again, plan=plan, cells=cells, common=common)
            more = more.replace_where(index, again)
        settled = measurements
        if plan.reach:
            settled, more = _settle(measurements, more, plan=plan, common=common)
        gain = more.evidence - known.evidence
        answer.gain[going, k] = gain
        kept = (gain > plan.threshold).nonzero()[:, 0]
        known, going = more.select(kept), going[kept]
        answer.take(going, known)
        if not len(kept):
            break
        measurements, candidates = settled.select(kept), candidates.select(kept)
    return answer, one


def _settle(
    measurements: Measurements,
    known: Hypothesis,
    *,
    plan: Plan,
    common: bool,
) -> tuple[Measurements, Hypothesis]:
    """Find the elements' offsets too; their prior counts in the evidence."""
    moved, places = calibrate(measurements, known.places, reach=plan.reach, common=common)
    found = weigh_evidence(moved, places[:, None], common=common, rounds=plan.rounds)
    evidence = found.value[:, 0] - doubt_offsets(moved, reach=plan.reach)
    prior = found.prior
    return moved, Hypothesis(places, evidence, prior.power[:, 0], prior.noise[:, 0], places)


def _prepare(measurements: Measurements, limit: int, *, common: bool) -> Located:
    """An answer without sources."""
    y, scenes = measurements.y, measurements.scenes
    real = measurements.positions.dtype
    empty = torch.zeros(scenes, limit, dtype=real, device=y.device)
    places = torch.zeros(scenes, limit, 3, dtype=real, device=y.device)
    places[..., 2] = 1.0
    return Located(
        places=places,
        count=torch.zeros(scenes, dtype=torch.int64, device=y.device),
        coherent=torch.full((scenes,), common, device=y.device),
        power=empty,
        noise=torch.zeros(scenes, dtype=real, device=y.device),
        evidence=torch.zeros(scenes, dtype=real, device=y.device),
        gain=torch.full_like(empty, torch.nan),
    )


def _measure_weakest(
    candidates: Candidates,
    found: Hypothesis,
    measurements: Measurements,
) -> torch.Tensor:
    """Power of the weakest source per antenna and snapshot over the noise, [B]."""
    level = candidates.own.mean((-2, -1)) / measurements.y.shape[1]
    return found.power.amin(-1) * level / found.noise


def fit_sources(
    measurements: Measurements,
    starts: torch.Tensor,
    *,
    plan: Plan,
    common: bool = False,
) -> Hypothesis:
    """Fit K sources from several starts and keep the most probable.

    First by maximum likelihood, which asks for nothing, then with the powers and the noise that
    follow.

    Args:
        measurements: B scenes.
        starts: [B, S, K, 3].
        plan: steps.
        common: one symbol for all snapshots.
    """
    places, cost = refine(measurements, starts, steps=plan.likely_steps, common=common)
    scene = torch.arange(len(cost), device=cost.device)
    early = places[scene, cost.argmin(-1)]
    prior = weigh_evidence(measurements, early[:, None], common=common, rounds=1).prior
    return _finish(measurements, early[:, None], prior, plan=plan, common=common)


def _finish(
    measurements: Measurements,
    starts: torch.Tensor,
    prior: Prior,
    *,
    plan: Plan,
    common: bool,
) -> Hypothesis:
    """Make the steps with powers from [B, S, K, 3] starts, and keep the most probable."""
    places, _ = refine(measurements, starts, steps=plan.prior_steps, common=common, prior=prior)
    found = weigh_evidence(measurements, places, common=common, rounds=plan.rounds)
    best = found.value.argmax(-1)
    scene = torch.arange(len(best), device=best.device)
    return Hypothesis(
        places=places[scene, best],
        evidence=found.value[scene, best],
        power=found.prior.power[scene, best],
        noise=found.prior.noise[scene, best],
        early=starts[scene, best],
    )


def add_source(
    measurements: Measurements,
    candidates: Candidates,
    known: Hypothesis | None,
    *,
    plan: Plan,
    cells: Cells,
    common: bool = False,
) -> Hypothesis:
    """Fit one source more than is known, from the candidates that then explain best."""
    fixed = candidates.places[:, :0] if known is None else known.places
    scores = score_candidates(measurements, candidates, fixed, common=common)
    new = candidates.pick(scores, plan.starts, cells)
    starts = _join(fixed, new)
    if candidates.together is not None:
        whole = candidates.together[:, : fixed.shape[1] + 1]
        starts = torch.cat((starts, whole[:, None]), dim=1)
    return fit_sources(measurements, starts, plan=plan, common=common)


def sweep(
    measurements: Measurements,
    candidates: Candidates,
    known: Hypothesis,
    *,
    plan: Plan,
    cells: Cells,
    common: bool = False,
) -> Hypothesis:
    """Seek every source again beside the others, with their powers; keep what is more probable.

    The others stand where maximum likelihood had left them, so that what comes out has made no
    more steps than what went in.
    """
    starts, powers = [], []
    for k in range(known.places.shape[1]):
        others = [i for i in range(known.places.shape[1]) if i != k]
        rest, power = known.early[:, others], known.power[:, others]
        prior = Prior(power, known.noise) if others else None
        scores = score_candidates(measurements, candidates, rest, common=common, prior=prior)
        starts.append(_join(rest, candidates.pick(scores, plan.starts, cells)))
        # of what is sought nothing is known: it is believed to be as strong as what it replaces
        turned = torch.cat((power, known.power[:, k : k + 1]), dim=-1)
        powers.append(turned[:, None].expand(-1, plan.starts, -1))
    many = torch.cat(starts, dim=1)
    prior = Prior(torch.cat(powers, dim=1), known.noise[:, None].expand(-1, many.shape[1]))
    found = _finish(measurements, many, prior, plan=plan, common=common)
    better = (found.evidence > known.evidence).nonzero()[:, 0]
    return known.replace_where(better, found.select(better))


def _join(fixed: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Starts [B, S, K + 1, 3] of K fixed sources [B, K, 3] and S new ones [B, S, 3]."""
    many = fixed[:, None].expand(-1, new.shape[1], -1, -1)
    return torch.cat((many, new[:, :, None]), dim=2)
