"""Config: every number of the system, with its unit; changed by `dataclasses.replace`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

Steering = Literal["exact", "second-order"]
Split = Literal["train", "val", "test"]
Profile = Literal["incident", "sound"]
Codebook = Literal["dft", "random"]
PowerLaw = Literal["path-loss", "equal"]

SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Scenario:
    """The world: surface, station, sources and noise. Angles in radians, lengths in metres."""

    rows: int  # elements along y
    columns: int  # elements along x
    antennas: int  # M, uniform linear array of the base station
    snapshots: int  # L, one surface code each
    sources: int  # K_MAX, sources per scene are uniform in 1..K_MAX
    range_min: float  # m
    range_max: float  # m
    snr_min: float  # dB, of the sum of the sources, mean clean power over (L, M)
    snr_max: float  # dB
    wavelength: float = 0.3  # m
    spacing: float = 0.15  # m, between neighbouring elements
    azimuth_limit: float = math.radians(60.0)  # rad, phi is uniform in +-limit
    elevation_limit: float = math.radians(30.0)  # rad, theta is uniform in +-limit
    rician_min: float = -10.0  # dB, line of sight over scatter, both of the same Frobenius norm
    rician_max: float = 5.0  # dB
    code_pool: int = 8  # DFT beams per axis that the codes are taken from
    code_bits: int | None = 3  # phase quantisation of the surface; None for continuous phases
    gain: float = 1000.0  # on the path amplitude wavelength / (4 pi r), for scale only
    coherent: bool = False  # one symbol for all snapshots instead of one per snapshot
    steering: Steering = "exact"
    # the same DFT beams in every scene, or phases drawn anew in every scene
    codebook: Codebook = "dft"
    power_law: PowerLaw = "path-loss"  # "equal": amplitude `gain` wherever the source is
    power_spread: float = 0.0  # dB, near-far: every source is weakened by 0 to this, uniform in dB
    spread_share: float = 1.0  # share of the scenes that have the spread
    coherent_share: float = 0.0  # share of scenes whose sources are coherent; 1 as `coherent`
    correlation_max: float = 1.0  # sources of a scene keep |<a_i, a_k>| below this
    # What the receiver does not know. Labels and the receiver keep the nominal surface.
    position_error: float = 0.0  # elements are moved by up to this in x and y, half wavelengths
    code_phase_error: float = 0.0  # rad, standard deviation of the phases really shown
    code_amplitude_error: float = 0.0  # standard deviation of the modulus really shown
    code_dropout: float = 0.0  # probability that an element reflects nothing in a snapshot
    channel_error: float | None = None  # dB, of the receiver's channel over the true one

    @property
    def elements(self) -> int:
        """N, elements of the surface."""
        return self.rows * self.columns

    @property
    def wavenumber(self) -> float:
        """k0 = 2 pi / wavelength, rad/m."""
        return 2.0 * math.pi / self.wavelength

    @property
    def aperture(self) -> float:
        """Diagonal of the surface between outermost element centres, m."""
        return self.spacing * math.hypot(self.rows - 1, self.columns - 1)

    @property
    def fraunhofer(self) -> float:
        """Far-field distance 2 D^2 / wavelength, m."""
        return 2.0 * self.aperture**2 / self.wavelength


@dataclass(frozen=True, slots=True)
class NetworkSize:
    """Sizes of the backbone and the heads of the incident's network."""

    width: int  # D
    layers: int
    heads: int
    feedforward: int
    grid: int  # cells per angle of the soft-argmax maps
    dropout: float = 0.2
    temperature: float = 0.15  # of the soft-argmax


@dataclass(frozen=True, slots=True)
class DetectorSize:
    """Sizes of the sound network: its cells, its images and its convolutions.

    The cells are uniform in (u_x, u_y, 1/r) over the field of view, about 0.4 beamwidths apart.
    """

    columns: int  # cells along u_x
    rows: int  # cells along u_y
    planes: int  # cells along 1/r
    channels: int
    blocks: int  # residual blocks of two convolutions
    ridges: tuple[float, ...] = (1.0, 0.1)  # of the whitening, one image each, over tr(H H^H)/M
    # Images are divided by what the surface can send there. Costs N^2 products per cell and scene.
    illuminated: bool = True
    capon_loading: float = 0.3  # of the sharpened image, over the mean of its diagonal
    # Peaks that are compared with each other by attention before they are read; 0 for none.
    queries: int = 0
    query_width: int = 96
    query_layers: int = 2
    query_heads: int = 4

    @property
    def cells(self) -> int:
        """G, cells of the heat map."""
        return self.columns * self.rows * self.planes

    @property
    def images(self) -> int:
        """Images per plane: one per ridge, the same by illumination, the sharpened one."""
        return len(self.ridges) * (1 + self.illuminated) + 1


@dataclass(frozen=True, slots=True)
class CovarianceForm:
    """How predicted factors become the covariance that the losses compare."""

    range_weight: float = 0.3  # weight of the range factors beside the angle factors
    blend: float = 0.30  # share of the sample covariance in R_blend
    # In a training the share rises from 0 over this part of it, two epochs at least, and is moved
    # by up to the jitter in every step; validation and single steps have it as it is.
    blend_rise: float = 0.2
    blend_jitter: float = 0.02
    loading: float = 1e-3  # diagonal loading at trace N
    shrink_base: float = 0.10  # shrinkage at 0 dB, falls as 10^(-snr/20)
    shrink_min: float = 1e-4
    shrink_max: float = 5e-2
    # Diagonal loading of R_hat at trace 1, in the align term only. The report had 1e-4. A smaller
    # array has a smaller null space whose eigenvalues seldom tie at that load; more load rounds
    # them to one float there too, so the small presets carry more.
    align_loading: float = 1e-4


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Weight of each loss term; the term's name is the field's name without `lam_`.

    The defaults are the incident's; `SOUND_WEIGHTS` are those of the sound profile.
    """

    lam_cov: float = 1.0
    lam_cov_pred: float = 0.05
    lam_ortho: float = 1e-3
    lam_cross: float = 2.5e-3
    lam_gap: float = 0.012
    lam_margin: float = 0.1
    lam_K: float = 0.5  # noqa: N815  the number of sources is K everywhere
    lam_aux: float = 1.0
    lam_peak: float = 0.2
    lam_range: float = 0.02
    lam_align: float = 0.002
    lam_subspace_align: float = 0.0
    lam_peak_contrast: float = 0.05
    lam_heatmap: float = 0.0
    lam_offset: float = 0.0


# The heat map leads. What reads the decoded sources corrects their offsets and powers, and what
# contains the sample covariance counts less than what does not: its subspace is a poor witness.
SOUND_WEIGHTS = LossWeights(
    lam_cov=0.1,
    lam_cov_pred=0.25,
    lam_aux=0.1,
    lam_align=0.02,
    lam_subspace_align=0.02,
    lam_heatmap=1.0,
    lam_offset=1.0,
)


@dataclass(frozen=True, slots=True)
class Training:
    """Batches, the optimiser, and when to look, to save and to stop."""

    batch_size: int  # scenes per step, over all processes
    learning_rate: float = 3e-4  # of the backbone
    head_factor: float = 4.0  # the head learns this much faster
    weight_decay: float = 1e-4
    warmup: int = 50  # steps of linear rise of the rate
    steps: int = 2400  # over which the rate falls by a cosine
    rate_floor: float = 0.02  # share of the rate that is left at the end
    train_scenes: int = 100_000
    val_scenes: int = 10_000
    test_scenes: int = 10_000
    clip: float = 1.0  # largest norm of all gradients together
    average_decay: float = 0.99  # of the moving average of the parameters; rises from 1/10
    epoch_scenes: int = 6400  # an epoch ends with a validation and a checkpoint
    validation_scenes: int = 512  # looked at after each epoch, always the same
    patience: int = 15  # epochs without a better validation loss before the run ends
    skip_limit: int = 30  # skipped steps in a row before the run ends; FP16 needs 16 for its scale
    # What is trained on beyond what the scenario has; the fields of the same names there.
    power_spread: float = 0.0  # dB
    spread_share: float = 1.0
    coherent_share: float = 0.0

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch."""
        return max(1, self.epoch_scenes // self.batch_size)

    def count_scenes(self, split: Split) -> int:
        """Scenes that the split holds."""
        scenes = {"train": self.train_scenes, "val": self.val_scenes, "test": self.test_scenes}
        return scenes[split]

    def count_batches(self, split: Split) -> int:
        """Whole batches that the split holds."""
        return self.count_scenes(split) // self.batch_size


@dataclass(frozen=True, slots=True)
class Config:
    """One complete system."""

    scenario: Scenario
    network: NetworkSize
    detector: DetectorSize
    training: Training
    covariance: CovarianceForm = field(default_factory=CovarianceForm)
    weights: LossWeights = field(default_factory=LossWeights)

    @property
    def training_scenario(self) -> Scenario:
        """The world of the training and validation scenes: harder where `training` says so."""
        extra = self.training
        if not (extra.power_spread or extra.coherent_share):
            return self.scenario
        return replace(
            self.scenario,
            power_spread=extra.power_spread,
            spread_share=extra.spread_share,
            coherent_share=extra.coherent_share,
        )

    def choose_scenario(self, split: Split) -> Scenario:
        """The world of a split."""
        return self.scenario if split == "test" else self.training_scenario


PRESETS: dict[str, Config] = {
    "tiny": Config(
        scenario=Scenario(
            rows=4,
            columns=4,
            antennas=4,
            snapshots=8,
            sources=2,
            range_min=0.3,
            range_max=1.5,
            snr_min=0.0,
            snr_max=20.0,
            code_pool=4,
        ),
        network=NetworkSize(width=32, layers=1, heads=2, feedforward=64, grid=9),
        detector=DetectorSize(columns=9, rows=7, planes=4, channels=8, blocks=1),
        training=Training(batch_size=8, epoch_scenes=800, validation_scenes=128),
        covariance=CovarianceForm(align_loading=1e-1),
    ),
    "small": Config(
        scenario=Scenario(
            rows=6,
            columns=6,
            antennas=8,
            snapshots=16,
            sources=2,
            range_min=0.5,
            range_max=3.0,
            snr_min=0.0,
            snr_max=20.0,
            codebook="random",
            power_law="equal",
            correlation_max=0.5,
        ),
        network=NetworkSize(width=128, layers=3, heads=4, feedforward=256, grid=21),
        detector=DetectorSize(columns=14, rows=9, planes=5, channels=32, blocks=4),
        # no coherent pairs: in these images they are one source, and teaching that they are two
        # makes the network doubt every single one
        training=Training(batch_size=64, steps=3000, power_spread=10.0, spread_share=0.25),
        covariance=CovarianceForm(align_loading=1e-2),
    ),
    "full": Config(
        scenario=Scenario(
            rows=12,
            columns=12,
            antennas=16,
            snapshots=16,
            sources=5,
            range_min=0.5,
            range_max=10.0,
            snr_min=-5.0,
            snr_max=20.0,
        ),
        network=NetworkSize(width=512, layers=4, heads=8, feedforward=512, grid=61),
        detector=DetectorSize(
            columns=28,
            rows=16,
            planes=8,
            channels=48,
            blocks=4,
            ridges=(0.1,),
            illuminated=False,  # 2 N^2 G multiplications per image and scene are too many here
            queries=8,
        ),
        training=Training(batch_size=64, steps=20_000, epoch_scenes=32_000),
    ),
}


def choose_preset(name: str) -> Config:
    """Return the preset of that name; a ValueError lists what there is."""
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        msg = f"there is no preset {name!r}; choose one of {known}"
        raise ValueError(msg)
    return PRESETS[name]


def apply_profile(config: Config, profile: Profile) -> Config:
    """Return the configuration of a profile: its weights and its rates."""
    if profile == "incident":
        return config
    training = replace(config.training, learning_rate=2e-3, head_factor=1.0)
    return replace(config, weights=SOUND_WEIGHTS, training=training)
