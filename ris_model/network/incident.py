"""The incident's network: a backbone that reads snapshots, a head that writes factors and slots.

As the case report had it, with one input put right: the channel itself is read, not its product
with the codes, from which the sensing operator cannot be inferred.

Shapes: B scenes, L snapshots, M antennas, N elements, K source slots (K_MAX), D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from ris_model.config import Config
from ris_model.covariance import combine_factors
from ris_model.data import Batch
from ris_model.linalg import at_least_fp32

# Nearest range that a slot can name, m; a clamp higher up would stop the gradient of a low start.
_LEAST_RANGE = 1e-3
# Spectral features: 5 families of K numbers, the first and the last eigenvalue.
_FEATURE_FAMILIES = 5
_FEATURE_ENDS = 2
# Keeps the logarithm of an eigenvalue at trace 1 finite.
_LEAST_EIGENVALUE = 1e-6


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the network says of a batch; factors are complex, the rest real."""

    factor_angle: torch.Tensor  # [B, N, K] raw angle factors
    factor_range: torch.Tensor  # [B, N, K] raw range factors
    factors: torch.Tensor  # [B, N, K] retracted and combined: R_pred = F F^H
    slots: torch.Tensor  # [B, K, 3] (phi, theta, r) in rad, rad, m
    phi_soft: torch.Tensor  # [B, K] rad, soft-argmax of the maps
    theta_soft: torch.Tensor  # [B, K] rad
    k_logits: torch.Tensor  # [B, K] class c means c + 1 sources


def split_parts(z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Real and imaginary part, interleaved in the last dimension: [..., C] -> [..., 2C]."""
    return torch.view_as_real(z).flatten(-2).to(dtype)


def join_parts(x: torch.Tensor) -> torch.Tensor:
    """Interleaved parts to complex: [..., 2C] -> [..., C], at least complex64."""
    return torch.view_as_complex(at_least_fp32(x).reshape(*x.shape[:-1], -1, 2))


class Backbone(nn.Module):
    """Snapshots, channel, codes and SNR to one vector per scene, [B, D]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        world, size = config.scenario, config.network
        half = size.width // 2
        self.snapshots = nn.Sequential(
            nn.Conv1d(2 * world.antennas, half, 5, padding=2),
            nn.GELU(),
            nn.Conv1d(half, half, 3, padding=1, groups=half),
            nn.GELU(),
            nn.Conv1d(half, size.width, 1),
        )
        layer = nn.TransformerEncoderLayer(
            size.width,
            size.heads,
            size.feedforward,
            dropout=size.dropout,
            activation="gelu",
            batch_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, size.layers, enable_nested_tensor=False)
        self.channel = nn.Linear(2 * world.antennas * world.elements, half)
        self.codes = nn.Conv1d(2 * world.elements, half, 1)
        # two halves, the snapshots' D, and the SNR
        self.fusion = nn.Linear(2 * size.width + 1, size.width)
        self.norm = nn.LayerNorm(size.width)
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Read a batch; works in the precision of its own parameters."""
        dtype = self.fusion.weight.dtype
        # the scene's level carries no geometry: without it the SNR and the path gain do not drown
        level = batch.y.abs().square().mean(dim=(-2, -1), keepdim=True).sqrt()
        y_BLC = split_parts(batch.y / level, dtype)
        tokens_BLD = self.encoder(self.snapshots(y_BLC.mT).mT)
        channel = self.channel(split_parts(batch.h.flatten(1), dtype))
        codes = self.codes(split_parts(batch.codes, dtype).mT).mean(-1)
        snr = (batch.snr_db[:, None] / 10.0).to(dtype)
        parts = torch.cat((tokens_BLD.mean(1), channel, codes, snr.to(channel.dtype)), dim=-1)
        fused: torch.Tensor = self.norm(self.fusion(parts))
        state: torch.Tensor = self.dropout(nn.functional.gelu(fused))
        return state


class Head(nn.Module):
    """Vector to factors, slots, angle maps and the number of sources."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        world, size = config.scenario, config.network
        self.slots_max = world.sources
        self.elements = world.elements
        self.range_weight = config.covariance.range_weight
        self.grid_cells = size.grid
        self.temperature = size.temperature
        self.limits = (world.azimuth_limit, world.elevation_limit)
        width, slots = size.width, world.sources
        self.factor_angle = nn.Linear(width, 2 * world.elements * slots)
        self.factor_range = nn.Linear(width, 2 * world.elements * slots)
        self.grid = nn.Linear(width, slots * size.grid**2)
        self.angles = nn.Linear(width, 2 * slots)
        self.ranges = nn.Linear(width, slots)
        features = _FEATURE_FAMILIES * slots + _FEATURE_ENDS
        self.count_spectral = nn.Sequential(
            nn.Linear(features, 64), nn.GELU(), nn.Linear(64, slots)
        )
        self.count_direct = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, slots))
        self.count_scale = nn.Parameter(torch.ones(()))

    def forward(self, state: torch.Tensor) -> Prediction:
        """Write a prediction; factors and what follows from them in at least FP32."""
        angle = self._write_factors(self.factor_angle(state))
        ranges = self._write_factors(self.factor_range(state))
        # from the factors onward nothing may run in half precision
        with torch.autocast(state.device.type, enabled=False):
            factors = combine_factors(angle, ranges, range_weight=self.range_weight)
            features = describe_spectrum(factors, elements=self.elements)
        spectral = self.count_spectral(features.to(self.count_scale.dtype))
        k_logits = self.count_scale * (spectral + self.count_direct(state)) / 2
        phi_soft, theta_soft = self._read_maps(self.grid(state))
        return Prediction(
            factor_angle=angle,
            factor_range=ranges,
            factors=factors,
            slots=self._write_slots(state),
            phi_soft=phi_soft,
            theta_soft=theta_soft,
            k_logits=k_logits,
        )

    def _write_factors(self, raw: torch.Tensor) -> torch.Tensor:
        """Interleaved [B, 2NK] to complex [B, N, K], columns of norm about 1."""
        factors = join_parts(raw).view(-1, self.elements, self.slots_max)
        return factors / math.sqrt(self.elements)

    def _write_slots(self, state: torch.Tensor) -> torch.Tensor:
        """Angles as they come, range by softplus, [B, K, 3]."""
        phi, theta = self.angles(state).chunk(2, dim=-1)
        r = nn.functional.softplus(self.ranges(state)) + _LEAST_RANGE
        return torch.stack((phi, theta, r.to(phi.dtype)), dim=-1)

    def _read_maps(self, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Soft-argmax of a theta x phi map per slot, two [B, K] in rad."""
        cells = self.grid_cells
        logits = at_least_fp32(raw).view(-1, self.slots_max, cells**2)
        weight = (logits / self.temperature).softmax(-1).view(-1, self.slots_max, cells, cells)
        axis = torch.linspace(-1.0, 1.0, cells, dtype=weight.dtype, device=weight.device)
        phi = (weight.sum(-2) * axis).sum(-1) * self.limits[0]
        theta = (weight.sum(-1) * axis).sum(-1) * self.limits[1]
        return phi, theta


def describe_spectrum(factors: torch.Tensor, *, elements: int) -> torch.Tensor:
    """Describe the spectrum of F F^H at trace 1: gaps, shares, slopes, MDL scores, its choice.

    The K largest eigenvalues are those of the small Gram matrix F^H F, the other N - K are 0.
    Only values are used, so repeated ones do no harm to the gradient.

    MDL(k) = (N - k) ln(arithmetic / geometric mean of the l_i, i > k) + k (2N - k) ln(N) / (2 N)

    Args:
        factors: [B, N, K] complex.
        elements: N.

    Returns:
        [B, 5K + 2] real.
    """
    gram = factors.mH @ factors
    values = torch.linalg.eigvalsh(gram).flip(-1)
    values = (values / values.sum(-1, keepdim=True)).clamp_min(_LEAST_EIGENVALUE)
    slots = values.shape[-1]
    rest = torch.full_like(values[:, :1], _LEAST_EIGENVALUE)
    following = torch.cat((values[:, 1:], rest), dim=-1)
    # sums over the noise eigenvalues i > k, k = 1..K
    null = elements - slots
    tail = values.flip(-1).cumsum(-1).flip(-1) - values + null * rest
    log_tail = values.log().flip(-1).cumsum(-1).flip(-1) - values.log() + null * rest.log()
    k = torch.arange(1, slots + 1, dtype=values.dtype, device=values.device)
    free = elements - k
    score = free * (tail / free).log() - log_tail
    penalty = k * (2 * elements - k) * math.log(elements) / (2 * elements)
    mdl = (score + penalty) / elements
    choice = nn.functional.one_hot(mdl.argmin(-1), slots).to(values.dtype)
    slope = (values.log() - following.log()) / 10.0
    families = (values - following, values.cumsum(-1), slope, mdl, choice)
    return torch.cat((*families, values[:, :1], rest), dim=-1)


class Localiser(nn.Module):
    """Backbone and head."""

    unread = ("head.grid",)  # parameters of outputs that no loss term reads

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.backbone = Backbone(config)
        self.head = Head(config)

    def forward(self, batch: Batch) -> Prediction:
        """Predict for every scene of the batch."""
        prediction: Prediction = self.head(self.backbone(batch))
        return prediction
