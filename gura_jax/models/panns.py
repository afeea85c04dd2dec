"""PANNs' CNN14, as its HEAR submission embeds: a scene for each clip, and a timestamp embedding every 10 ms.

Follows the package ``panns-hear`` for a clip by itself, but that times are in milliseconds; there they are in seconds,
so that HEAR took them all for the first tenth of a second. Paper: PANNs (Kong et al., 2020).
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from gura_jax.convert.panns import KEYS
from gura_jax.models.config import EncoderConfig
from gura_jax.models.convnets import batch_norm, loudest, over_columns, places_within, refuse_options, repeated, within
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
from gura_jax.models.spectrogram import Spectrogram, decibels

SAMPLE_RATE = 32_000  # Hz
SHORTEST = 32_000  # samples: shorter clips are filled up with silence
MELS, HOP = 64, 320
POOLS = 5  # each halves time and bands
STRIDE = 2**POOLS  # columns of a segment
HALO = 4 * STRIDE  # columns that a segment's convolutions see beyond it, and a few more
_SPECTROGRAM = Spectrogram(MELS, "slaney", 50, 14_000, 1024, 1024, HOP, area=True, sample_rate=SAMPLE_RATE)


@dataclasses.dataclass(frozen=True)
class PannsConfig(EncoderConfig):
    """Sizes; defaults are those of CNN14."""

    model_types: ClassVar[tuple[str, ...]] = ("panns_cnn14",)
    activations: ClassVar[tuple[str, ...]] = ()

    model_type: str = "panns_cnn14"
    channels: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)  # of each block

    def _relation_faults(self) -> Iterator[str]:
        if len(self.channels) != POOLS + 1:
            yield f"channels: expected {POOLS + 1} numbers, found {len(self.channels)}"

    def tiny(self) -> Self:
        """A small encoder of the same kind."""
        return dataclasses.replace(self, channels=(4, 6, 8, 8, 12, 16))


class ConvBlock(nnx.Module):
    """Two convolutions, each with batch norm and ReLU."""

    def __init__(self, in_size: int, size: int, options: Options, *, rngs: nnx.Rngs) -> None:
        self.conv1, self.conv2 = (
            nnx.Conv(inputs, size, (3, 3), use_bias=False, dtype=options.compute_dtype, rngs=rngs)
            for inputs in (in_size, size)
        )
        self.bn1, self.bn2 = batch_norm(size, rngs), batch_norm(size, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """[B, T, M, C], [B, T] -> [B, T, M, C']; zero where the mask is false, as if the clip ended there."""
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2)):
            x = within(jax.nn.relu(norm(conv(x))), mask)
        return x


def _halved(x: jax.Array) -> jax.Array:
    """Means of two by two: [B, T, M, C] -> [B, T // 2, M // 2, C]."""
    B, T, M, C = x.shape
    return x[:, : T // 2 * 2, : M // 2 * 2].reshape(B, T // 2, 2, M // 2, 2, C).mean(axis=(2, 4))


class Cnn14(nnx.Module):
    """Six blocks, of which five halve the resolution, and the layer that makes an embedding of the clip."""

    def __init__(self, config: PannsConfig, options: Options, *, rngs: nnx.Rngs) -> None:
        sizes = (1, *config.channels)
        self.bn0 = batch_norm(MELS, rngs)
        self.blocks = nnx.List(ConvBlock(a, b, options, rngs=rngs) for a, b in itertools.pairwise(sizes))
        self.fc1 = nnx.Linear(sizes[-1], sizes[-1], dtype=options.compute_dtype, rngs=rngs)

    def segments(self, mel: jax.Array, start: jax.Array, counts: jax.Array) -> jax.Array:
        """Columns from ``start`` on, which may be before the clip: [B, W, M] -> [B, W // 32, D]."""
        x = self.bn0(mel)[..., None]
        for level, block in enumerate(self.blocks):
            mask = places_within(start >> level, x.shape[1], counts >> level)
            x = block(within(x, mask), mask)
            x = _halved(x) if level < POOLS else x
        return x.mean(axis=2)

    def embedding(self, x: jax.Array, counts: jax.Array) -> jax.Array:
        """Of a clip, from its segments: [B, T, D], [B] -> [B, D]."""
        mean = masked_mean(x, frame_mask(counts, x.shape[1]))
        return jax.nn.relu(self.fc1(loudest(x, counts) + mean).astype(jnp.float32))


class PannsEncoder(ModuleEncoder):
    """CNN14 as a member: a frame every 10 ms, of which 32 are the same; pooled: the layer before its classes."""

    config: PannsConfig

    def __init__(self, config: PannsConfig, options: Options) -> None:
        super().__init__(config, options)
        refuse_options(config.model_type, options, HOP)
        self.sample_rate, self.grid, self.least = SAMPLE_RATE, FrameGrid(HOP, 0.0, 0), SHORTEST
        self.feature_size = self.pooled_size = config.channels[-1]
        self.parts = ("log-mel", "segments", "frames")

    def module(self, rngs: nnx.Rngs) -> Cnn14:
        """The network with fresh weights."""
        return Cnn14(self.config, self.options, rngs=rngs)

    def __call__(self, params: Params, audio: jax.Array, lengths: jax.Array) -> Output:
        """Frames [B, T, D], counts [B] and pooled [B, D]."""
        network: Cnn14 = self.network(params)
        mel, columns = self._log_mel(audio, lengths)
        segments = self._segments(network, mel, columns)
        frames = self._frames(segments, columns, self.grid.count(audio.shape[1]))
        return Output(frames, self.grid.count(lengths), network.embedding(segments, columns // STRIDE))

    def states(
        self, params: Params, audio: jax.Array, lengths: jax.Array
    ) -> Iterator[tuple[str, jax.Array, jax.Array]]:
        """The spectrogram in dB, the last block's output every 320 ms, and the frames."""
        mel, columns = self._log_mel(audio, lengths)
        yield "log-mel", mel, columns
        segments = self._segments(self.network(params), mel, columns)
        yield "segments", segments, columns // STRIDE
        yield "frames", self._frames(segments, columns, self.grid.count(audio.shape[1])), self.grid.count(lengths)

    def _log_mel(self, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, F, 64] in dB, and the number of columns of each clip."""
        audio = jnp.pad(audio, ((0, 0), (0, max(0, SHORTEST - audio.shape[1]))))
        lengths = jnp.maximum(lengths, SHORTEST)
        power = _SPECTROGRAM(audio, lengths, self.options.platform)
        return decibels(power), _SPECTROGRAM.count(lengths)

    def _segments(self, network: Cnn14, mel: jax.Array, counts: jax.Array) -> jax.Array:
        """[B, F, M] -> [B, F // 32, D], in blocks of columns that see what is around them."""
        block = self.options.rematerialise(lambda some, start: network.segments(some, start, counts))
        return over_columns(block, mel, STRIDE, HALO, self.options.platform.spectra)

    def _frames(self, segments: jax.Array, columns: jax.Array, number: int) -> jax.Array:
        """Each segment for each of its columns, the last one for those that are left: [B, number, D]."""
        return repeated(segments, columns // STRIDE, jnp.zeros_like(columns), number, STRIDE)


PANNS = Family(
    name="panns_cnn14",
    config=PannsConfig,
    build=PannsEncoder,
    keys=KEYS,
    reference="gura_jax.convert.references.Panns",
    presets={"panns-cnn14": Preset(PannsConfig(), licence="CC-BY-4.0")},  # files of zenodo.org/records/3987831
)
