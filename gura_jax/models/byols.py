"""BYOL-S (AudioNTT2020) as its HEAR submission embeds: a scene for each clip, and a timestamp embedding every 50 ms.

Follows the submission ``serab_byols`` for a clip by itself; there the spectrograms of a batch share mean and deviation.
Timestamps are of a second around each, filled up with silence. Their mean and deviation are those of all windows,
divided by the number of windows, as there: so they grow with the clip. Paper: BYOL-S (Elbanna et al., 2022).
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from gura_jax.convert.byols import KEYS
from gura_jax.models.config import EncoderConfig
from gura_jax.models.convnets import (
    Windows,
    batch_norm,
    deviation,
    loudest,
    moments,
    over_columns,
    places_within,
    refuse_options,
    within,
)
from gura_jax.models.encoder import (
    Family,
    FrameGrid,
    ModuleEncoder,
    Options,
    Output,
    Params,
    Preset,
    frame_mask,
    masked_mean,
)
from gura_jax.models.spectrogram import FLOAT32_EPS, Spectrogram

SAMPLE_RATE = 16_000  # Hz
MELS, COLUMN_HOP = 64, 160
HOP, WINDOW = 800, 16_000  # samples from one timestamp to the next, and around each
LAYERS = 3  # each halves time and bands
STRIDE = 2**LAYERS  # columns of a step
HALO = STRIDE  # columns that a step's convolutions see beyond it, and one more
_SPECTROGRAM = Spectrogram(MELS, "htk", 60, 7800, 400, 1024, COLUMN_HOP)


@dataclasses.dataclass(frozen=True)
class ByolsConfig(EncoderConfig):
    """Sizes; defaults are those of the submission."""

    model_types: ClassVar[tuple[str, ...]] = ("byol_s",)
    activations: ClassVar[tuple[str, ...]] = ()

    model_type: str = "byol_s"
    hidden_size: int = 2048
    channels: int = 64

    def tiny(self) -> Self:
        """A small encoder of the same kind."""
        return dataclasses.replace(self, hidden_size=16, channels=4)


class AudioNTT(nnx.Module):
    """Three convolutions, each with batch norm, ReLU and a pooling by two; and two layers for each step of time."""

    def __init__(self, config: ByolsConfig, options: Options, *, rngs: nnx.Rngs) -> None:
        size, dtype = config.channels, options.compute_dtype
        self.convs = nnx.List(nnx.Conv(size if i else 1, size, (3, 3), dtype=dtype, rngs=rngs) for i in range(LAYERS))
        self.norms = nnx.List(batch_norm(size, rngs) for _ in range(LAYERS))
        self.fc1 = nnx.Linear(size * MELS // STRIDE, config.hidden_size, dtype=dtype, rngs=rngs)
        self.fc2 = nnx.Linear(config.hidden_size, config.hidden_size, dtype=dtype, rngs=rngs)

    def steps(self, mel: jax.Array, start: jax.Array, counts: jax.Array) -> jax.Array:
        """Columns from ``start`` on, which may be before the clip: [B, W, M] -> [B, W // 8, D]."""
        x = mel[..., None]
        for level, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            mask = places_within(start >> level, x.shape[1], counts >> level)
            x = jax.nn.relu(norm(conv(within(x, mask))))
            x = nnx.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(*x.shape[:2], -1)
        return jax.nn.relu(self.fc2(jax.nn.relu(self.fc1(x)))).astype(jnp.float32)


class ByolsEncoder(ModuleEncoder):
    """BYOL-S as a member; pooled: the submission's scene."""

    config: ByolsConfig

    def __init__(self, config: ByolsConfig, options: Options) -> None:
        super().__init__(config, options)
        refuse_options(config.model_type, options, HOP)
        self.sample_rate, self.grid = SAMPLE_RATE, FrameGrid(HOP, 0.0, 0)
        self.shortest = (STRIDE - 1) * COLUMN_HOP
        self.feature_size = self.pooled_size = config.hidden_size
        self.parts = ("log-mel", "frames")

    def module(self, rngs: nnx.Rngs) -> AudioNTT:
        """The network with fresh weights."""
        return AudioNTT(self.config, self.options, rngs=rngs)

    def __call__(self, params: Params, audio: jax.Array, lengths: jax.Array) -> Output:
        """Frames [B, T, D], counts [B] and pooled [B, D]."""
        network: AudioNTT = self.network(params)
        mel, columns = self._log_mel(audio, lengths), _SPECTROGRAM.count(lengths)
        steps = self._steps(network, mel, columns)
        counts = columns // STRIDE
        scene = masked_mean(steps, frame_mask(counts, steps.shape[1])) + loudest(steps, counts)
        return Output(self._frames(network, audio, lengths), self.grid.count(lengths), scene)

    def states(
        self, params: Params, audio: jax.Array, lengths: jax.Array
    ) -> Iterator[tuple[str, jax.Array, jax.Array]]:
        """The clip's spectrogram, normalised, and the timestamps."""
        yield "log-mel", self._log_mel(audio, lengths), _SPECTROGRAM.count(lengths)
        yield "frames", self._frames(self.network(params), audio, lengths), self.grid.count(lengths)

    def _logarithm(self, audio: jax.Array, lengths: jax.Array) -> jax.Array:
        """[B, N], [B] -> [B, F, M]."""
        return jnp.log(_SPECTROGRAM(audio, lengths, self.options.platform) + FLOAT32_EPS)

    def _log_mel(self, audio: jax.Array, lengths: jax.Array) -> jax.Array:
        """[B, F, M], of zero mean and unit deviation over each clip."""
        x = self._logarithm(audio, lengths)
        mask = frame_mask(_SPECTROGRAM.count(lengths), x.shape[1])
        mean, squares = moments(x, mask)
        number = (MELS * _SPECTROGRAM.count(lengths)).astype(jnp.float32)
        return (x - mean[:, None, None]) / deviation(squares, number)[:, None, None]

    def _steps(self, network: AudioNTT, mel: jax.Array, counts: jax.Array) -> jax.Array:
        """[B, F, M] -> [B, F // 8, D]."""
        block = self.options.rematerialise(lambda some, start: network.steps(some, start, counts))
        return over_columns(block, mel, STRIDE, HALO, self.options.platform.spectra)

    def _frames(self, network: AudioNTT, audio: jax.Array, lengths: jax.Array) -> jax.Array:
        """[B, N], [B] -> [B, T, D]."""
        counts, columns = self.grid.count(lengths), _SPECTROGRAM.count(WINDOW)

        def statistics(total: jax.Array, mean: jax.Array, squares: jax.Array) -> tuple[jax.Array, jax.Array]:
            number = counts.astype(jnp.float32)
            return mean / number, deviation(squares, total) / number

        def embed(x: jax.Array) -> jax.Array:
            steps = network.steps(x, jnp.zeros((), jnp.int32), jnp.full(len(x), columns, jnp.int32))
            return steps.mean(axis=1) + steps.max(axis=1)

        windows = Windows(HOP, WINDOW, WINDOW // 2, columns, self.options.platform.spectra)
        number = self.grid.count(audio.shape[1])
        return windows(audio, counts, number, self._logarithm, statistics, embed, self.options)


BYOLS = Family(
    name="byol_s",
    config=ByolsConfig,
    build=ByolsEncoder,
    keys=KEYS,
    reference="gura_jax.convert.references.Byols",
    presets={"byol-s": Preset(ByolsConfig(), licence="MIT")},  # checkpoints/default2048... of its repository
)
