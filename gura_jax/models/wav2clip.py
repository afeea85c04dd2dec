"""Wav2CLIP as its HEAR submission embeds: a scene for each clip, and a timestamp embedding every 50 ms.

Follows the package ``wav2clip`` for a clip by itself; there the spectrograms of a whole batch share mean and deviation.
Timestamps are of the second that follows each, and share theirs. Paper: Wav2CLIP (Wu et al., 2022).
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from gura_jax.convert.wav2clip import KEYS
from gura_jax.models.config import EncoderConfig
from gura_jax.models.convnets import (
    Windows,
    batch_norm,
    deviation,
    moments,
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
from gura_jax.models.spectrogram import Spectrogram

SAMPLE_RATE = 16_000  # Hz
COLUMN_HOP, BINS = 353, 257
HOP, WINDOW = 800, 16_000  # samples from one timestamp to the next, and after each
POWER_FLOOR, DEVIATION_FLOOR = 1e-7, 1e-9  # added
_SPECTROGRAM = Spectrogram(BINS, "linear", 0, 8000, 512, 512, COLUMN_HOP)


@dataclasses.dataclass(frozen=True)
class Wav2ClipConfig(EncoderConfig):
    """Sizes; defaults are those of ResNet-18."""

    model_types: ClassVar[tuple[str, ...]] = ("wav2clip",)
    activations: ClassVar[tuple[str, ...]] = ()

    model_type: str = "wav2clip"
    channels: tuple[int, ...] = (64, 128, 256, 512)  # of each stage
    hidden_size: int = 512
    embedding_size: int = 512

    def tiny(self) -> Self:
        """A small encoder of the same kind."""
        return dataclasses.replace(self, channels=(4, 6, 8, 12), hidden_size=16, embedding_size=16)


class Convolution(nnx.Module):
    """A convolution without bias, padded by half of its kernel, and batch norm."""

    def __init__(self, in_size: int, size: int, kernel: int, stride: int, options: Options, *, rngs: nnx.Rngs) -> None:
        self.stride, around = stride, (kernel // 2, kernel // 2)
        self.conv = nnx.Conv(
            in_size,
            size,
            (kernel, kernel),
            strides=stride,
            padding=(around, around),
            use_bias=False,
            dtype=options.compute_dtype,
            rngs=rngs,
        )
        self.norm = batch_norm(size, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, M, C] -> [B, (T - 1) // stride + 1, (M - 1) // stride + 1, C']."""
        return self.norm(self.conv(x))


class BasicBlock(nnx.Module):
    """Two convolutions, and the input beside them (He et al., 2016)."""

    def __init__(self, in_size: int, size: int, stride: int, options: Options, *, rngs: nnx.Rngs) -> None:
        self.conv1 = Convolution(in_size, size, 3, stride, options, rngs=rngs)
        self.conv2 = Convolution(size, size, 3, 1, options, rngs=rngs)
        changes = stride > 1 or in_size != size
        self.downsample = Convolution(in_size, size, 1, stride, options, rngs=rngs) if changes else None
        self.stride = stride

    def __call__(self, x: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, T, M, C], [B] -> [B, T', M', C'], [B]; zero past each clip's end."""
        own = x if self.downsample is None else self.downsample(x)
        counts = _strided(counts, self.stride)
        mask = frame_mask(counts, own.shape[1])
        x = self.conv2(within(jax.nn.relu(self.conv1(x)), mask))
        return within(jax.nn.relu(x + own), mask), counts


def _strided(counts: jax.Array, stride: int) -> jax.Array:
    """Columns of a convolution's result, padded by half of its kernel."""
    return (counts - 1) // stride + 1


class Wav2Clip(nnx.Module):
    """ResNet-18 with one channel, the mean of its output, and two layers."""

    def __init__(self, config: Wav2ClipConfig, options: Options, *, rngs: nnx.Rngs) -> None:
        sizes, dtype = (config.channels[0], *config.channels), options.compute_dtype
        self.conv1 = Convolution(1, sizes[0], 7, 2, options, rngs=rngs)
        self.blocks = nnx.List(
            BasicBlock(sizes[i] if k == 0 else sizes[i + 1], sizes[i + 1], 2 if i and k == 0 else 1, options, rngs=rngs)
            for i in range(len(config.channels))
            for k in range(2)
        )
        self.fc1 = nnx.Linear(sizes[-1], config.hidden_size, dtype=dtype, rngs=rngs)
        self.fc2 = nnx.Linear(config.hidden_size, config.embedding_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, counts: jax.Array) -> jax.Array:
        """Normalised spectrograms [B, F, 257] and their columns [B] -> [B, D]."""
        x = jax.nn.relu(self.conv1(within(x[..., None], frame_mask(counts, x.shape[1]))))
        counts = _strided(counts, 2)
        x = within(x, frame_mask(counts, x.shape[1]))
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # zeros, which no maximum of a ReLU falls below
        x = nnx.max_pool(x, (3, 3), (2, 2))
        counts = _strided(counts, 2)
        x = within(x, frame_mask(counts, x.shape[1]))
        for block in self.blocks:
            x, counts = block(x, counts)
        x = masked_mean(x.mean(axis=2), frame_mask(counts, x.shape[1]))
        return self.fc2(jax.nn.relu(self.fc1(x))).astype(jnp.float32)


class Wav2ClipEncoder(ModuleEncoder):
    """Wav2CLIP as a member; pooled: the submission's scene."""

    config: Wav2ClipConfig

    def __init__(self, config: Wav2ClipConfig, options: Options) -> None:
        super().__init__(config, options)
        refuse_options(config.model_type, options, HOP)
        self.sample_rate, self.grid = SAMPLE_RATE, FrameGrid(HOP, 0.0, WINDOW)
        self.shortest_pooled = _SPECTROGRAM.shortest
        self.feature_size = self.pooled_size = config.embedding_size
        self.parts = ("spectrogram", "frames")

    def module(self, rngs: nnx.Rngs) -> Wav2Clip:
        """The network with fresh weights."""
        return Wav2Clip(self.config, self.options, rngs=rngs)

    def __call__(self, params: Params, audio: jax.Array, lengths: jax.Array) -> Output:
        """Frames [B, T, D], counts [B] and pooled [B, D]."""
        network: Wav2Clip = self.network(params)
        scene = network(self._normalised(audio, lengths), _SPECTROGRAM.count(lengths))
        return Output(self._frames(network, audio, lengths), self.grid.count(lengths), scene)

    def states(
        self, params: Params, audio: jax.Array, lengths: jax.Array
    ) -> Iterator[tuple[str, jax.Array, jax.Array]]:
        """The clip's spectrogram, normalised, and the timestamps."""
        yield "spectrogram", self._normalised(audio, lengths), _SPECTROGRAM.count(lengths)
        yield "frames", self._frames(self.network(params), audio, lengths), self.grid.count(lengths)

    def _logarithm(self, audio: jax.Array, lengths: jax.Array) -> jax.Array:
        """[B, N], [B] -> [B, F, 257]."""
        return jnp.log(_SPECTROGRAM(audio, lengths, self.options.platform) + POWER_FLOOR)

    def _normalised(self, audio: jax.Array, lengths: jax.Array) -> jax.Array:
        """[B, F, 257], of zero mean and unit deviation over each clip."""
        x, counts = self._logarithm(audio, lengths), _SPECTROGRAM.count(lengths)
        mean, squares = moments(x, frame_mask(counts, x.shape[1]))
        spread = deviation(squares, (BINS * counts).astype(jnp.float32)) + DEVIATION_FLOOR
        return (x - mean[:, None, None]) / spread[:, None, None]

    def _frames(self, network: Wav2Clip, audio: jax.Array, lengths: jax.Array) -> jax.Array:
        """[B, N], [B] -> [B, T, D]."""
        number, columns = self.grid.count(audio.shape[1]), _SPECTROGRAM.count(WINDOW)
        if not number:
            return jnp.zeros((len(audio), 0, self.feature_size), jnp.float32)

        def statistics(total: jax.Array, mean: jax.Array, squares: jax.Array) -> tuple[jax.Array, jax.Array]:
            return mean, deviation(squares, total) + DEVIATION_FLOOR

        def embed(x: jax.Array) -> jax.Array:
            return network(x, jnp.full(len(x), columns, jnp.int32))

        windows = Windows(HOP, WINDOW, 0, columns, self.options.platform.spectra)
        counts = self.grid.count(lengths)
        return windows(audio, counts, number, self._logarithm, statistics, embed, self.options)


WAV2CLIP = Family(
    name="wav2clip",
    config=Wav2ClipConfig,
    build=Wav2ClipEncoder,
    keys=KEYS,
    reference="gura_jax.convert.references.Wav2Clip",
    presets={"wav2clip": Preset(Wav2ClipConfig(), licence="MIT")},  # Wav2CLIP.pt of its repository
)
