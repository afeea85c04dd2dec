"""BYOL-S (AudioNTT2020) as its HEAR submission embeds: a scene for each clip, and a timestamp embedding every 50 ms.

Follows the submission ``serab_byols`` for a clip by itself; there the spectrograms of a batch share mean and deviation.
Timestamps are of a second around each, filled up with silence. Their mean and deviation are those of all windows,
divided by the number of windows, as there: so they grow with the clip. Paper: BYOL-S (Elbanna et al., 2022).
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gura_jax.convert.byols import KEYS
from gura_jax.models.attention import even_blocks
from gura_jax.models.config import EncoderConfig
from gura_jax.models.convnets import (
    batch_norm,
    combined_moments,
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
        mel, columns = self._log_mel(audio, lengths), 1 + lengths // COLUMN_HOP
        steps = self._steps(network, mel, columns)
        counts = columns // STRIDE
        scene = masked_mean(steps, frame_mask(counts, steps.shape[1])) + loudest(steps, counts)
        return Output(self._frames(network, audio, lengths), self.grid.count(lengths), scene)

    def states(
        self, params: Params, audio: jax.Array, lengths: jax.Array
    ) -> Iterator[tuple[str, jax.Array, jax.Array]]:
        """The clip's spectrogram, normalised, and the timestamps."""
        yield "log-mel", self._log_mel(audio, lengths), 1 + lengths // COLUMN_HOP
        yield "frames", self._frames(self.network(params), audio, lengths), self.grid.count(lengths)

    def _logarithm(self, audio: jax.Array, lengths: jax.Array) -> jax.Array:
        """[B, N], [B] -> [B, F, M]."""
        return jnp.log(_SPECTROGRAM(audio, lengths, self.options.platform) + FLOAT32_EPS)

    def _log_mel(self, audio: jax.Array, lengths: jax.Array) -> jax.Array:
        """[B, F, M], of zero mean and unit deviation over each clip."""
        x = self._logarithm(audio, lengths)
        mask = frame_mask(1 + lengths // COLUMN_HOP, x.shape[1])
        mean, squares = moments(x, mask)
        number = (MELS * (1 + lengths // COLUMN_HOP)).astype(jnp.float32)
        return (x - mean[:, None, None]) / deviation(squares, number)[:, None, None]

    def _steps(self, network: AudioNTT, mel: jax.Array, counts: jax.Array) -> jax.Array:
        """[B, F, M] -> [B, F // 8, D]."""
        block = self.options.rematerialise(lambda some, start: network.steps(some, start, counts))
        return over_columns(block, mel, STRIDE, HALO, self.options.platform.spectra)

    def _frames(self, network: AudioNTT, audio: jax.Array, lengths: jax.Array) -> jax.Array:
        """[B, N], [B] -> [B, T, D], some windows at a time: first their mean and deviation, then what they embed to."""
        B, T = len(audio), self.grid.count(audio.shape[1])
        columns = 1 + WINDOW // COLUMN_HOP
        blocks, size = even_blocks(T, max(1, self.options.platform.spectra // (columns * B)))
        end = max(0, (blocks * size - 1) * HOP + WINDOW // 2 - audio.shape[1])
        padded = jnp.pad(audio, ((0, 0), (WINDOW // 2, end)))
        index = np.arange(size, dtype=np.int32)[:, None] * HOP + np.arange(WINDOW, dtype=np.int32)[None, :]
        counts = self.grid.count(lengths)

        def over_windows(function: Callable[[jax.Array, jax.Array], Any]) -> Any:
            """A function of the logarithms [B, F, W, M] of some windows, and of the first's number."""

            def block(start: jax.Array) -> Any:
                span = (size - 1) * HOP + WINDOW
                some = jax.lax.dynamic_slice_in_dim(padded, HOP * start, span, axis=1)[:, index]
                some = some.reshape(B * size, WINDOW)
                mel = self._logarithm(some, jnp.full(len(some), WINDOW, jnp.int32))
                return function(mel.reshape(B, size, columns, MELS), start)

            return jax.lax.map(self.options.rematerialise(block), size * jnp.arange(blocks, dtype=jnp.int32))

        def some_moments(x: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            mask = jnp.repeat(places_within(start, size, counts), columns, axis=1)
            # Column by column: sums of few numbers round less.
            return mask.sum(axis=1, dtype=x.dtype) * MELS, *moments(x.reshape(B, size * columns, MELS), mask)

        total, mean, squares = combined_moments(*over_windows(some_moments))
        number = counts.astype(jnp.float32)
        mean, spread = mean / number, deviation(squares, total) / number

        def embedded(x: jax.Array, start: jax.Array) -> jax.Array:
            x = (x - mean[:, None, None, None]) / spread[:, None, None, None]
            whole = jnp.full(B * size, columns, jnp.int32)
            steps = network.steps(x.reshape(B * size, columns, MELS), jnp.zeros((), jnp.int32), whole)
            return (steps.mean(axis=1) + steps.max(axis=1)).reshape(B, size, -1)

        x = over_windows(embedded)  # [blocks, B, F, D]
        return x.swapaxes(0, 1).reshape(B, blocks * size, -1)[:, :T]


BYOLS = Family(
    name="byol_s",
    config=ByolsConfig,
    build=ByolsEncoder,
    keys=KEYS,
    reference="gura_jax.convert.references.Byols",
    presets={"byol-s": Preset(ByolsConfig(), licence="MIT")},  # checkpoints/default2048... of its repository
)
