"""What encoders of two-dimensional convolutions share: masks, blocks of columns, windows, refused options."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gura_jax.errors import SystemConfigError
from gura_jax.models.attention import even_blocks
from gura_jax.models.encoder import Options, frame_mask, masked_mean

MIN_VARIANCE = 1e-8  # of logarithms: below it is rounding, as of silence
BATCH_NORM_EPS = 1e-5  # PyTorch's default
LEAST_OF_HALO = 8  # of a block's columns by its halo's: a quarter more is then computed twice, at most


def batch_norm(size: int, rngs: nnx.Rngs, epsilon: float = BATCH_NORM_EPS) -> nnx.BatchNorm:
    """With the statistics of training, in float32."""
    return nnx.BatchNorm(size, use_running_average=True, epsilon=epsilon, dtype=jnp.float32, rngs=rngs)


def refuse_options(name: str, options: Options, hop: int) -> None:
    """Refuse those that an encoder of a spectrogram without layers does not have.

    Raises:
        SystemConfigError: a choice of layers, another hop, or normalised input.
    """
    if not isinstance(options.layers, str) or options.layers != "last":
        raise SystemConfigError(f"layers: {name} has one embedding, and no choice of layers; found {options.layers!r}")
    if options.hop is not None:
        raise SystemConfigError(f"hop: {name} has a frame every {hop} samples, and no choice")
    if options.normalise:
        raise SystemConfigError(f"normalise: {name} normalises its spectrogram, and no clip")


def within(x: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, T, M, C], [B, T] -> [B, T, M, C], zero where the mask is false, as if the clip ended there."""
    return jnp.where(mask[:, :, None, None], x, 0.0)


def over_columns(
    function: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, stride: int, halo: int, size: int
) -> jax.Array:
    """Call a function of a spectrogram's columns in blocks that see what is around them.

    Args:
        function: (columns [B, W, M], place of the first, which may be before the clip) -> [B, W // stride, D].
        x: [B, F, M].
        stride: columns for each result.
        halo: columns that a result sees before and after its own, at most; a multiple of ``stride``.
        size: roughly how many columns a block has, those of all clips counted together; of each clip at least
            :data:`LEAST_OF_HALO` times the halo.

    Returns:
        [B, F // stride, D].
    """
    (B, F, _), total = x.shape, x.shape[1] // stride
    blocks, results = even_blocks(total, max(1, size // B, LEAST_OF_HALO * halo) // stride)
    if blocks == 1:
        return function(x, jnp.zeros((), jnp.int32))
    x = jnp.pad(x, ((0, 0), (halo, max(0, blocks * results * stride + halo - F)), (0, 0)))

    def block(start: jax.Array) -> jax.Array:
        some = jax.lax.dynamic_slice_in_dim(x, start, results * stride + 2 * halo, axis=1)
        return function(some, start - halo)[:, halo // stride : halo // stride + results]

    out = jax.lax.map(block, results * stride * jnp.arange(blocks, dtype=jnp.int32))  # [blocks, B, results, D]
    return out.swapaxes(0, 1).reshape(B, blocks * results, -1)[:, :total]


def repeated(segments: jax.Array, counts: jax.Array, first: jax.Array, number: int, stride: int) -> jax.Array:
    """Each segment for each of its columns, the last one for those that are left.

    Args:
        segments: [B, T, D].
        counts: [B] int32, segments of each clip.
        first: [B] int32, the column to begin with.
        number: of columns.
        stride: columns of a segment.

    Returns:
        [B, number, D].
    """
    index = (first[:, None] + jnp.arange(number, dtype=jnp.int32)[None, :]) // stride
    index = jnp.minimum(index, jnp.maximum(counts, 1)[:, None] - 1)
    return jnp.take_along_axis(segments, index[:, :, None], axis=1, mode="clip")


def places_within(start: jax.Array, number: int, counts: jax.Array) -> jax.Array:
    """Which of so many places from ``start`` on are in each clip: [], [B] -> [B, number]."""
    place = start + jnp.arange(number, dtype=jnp.int32)
    return (place >= 0)[None, :] & (place[None, :] < counts[:, None])


def loudest(x: jax.Array, counts: jax.Array) -> jax.Array:
    """Maximum over each clip's frames: [B, T, D], [B] -> [B, D]; of no frames, zero."""
    highest = jnp.where(frame_mask(counts, x.shape[1])[:, :, None], x, -jnp.inf).max(axis=1)
    return jnp.where((counts > 0)[:, None], highest, 0.0)


def moments(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean, and sum of the squares around it, of what is within each clip: [B, F, M], [B, F] -> [B], [B]."""
    mean = masked_mean(x, mask).mean(axis=1)
    centred = jnp.where(mask[:, :, None], x - mean[:, None, None], 0.0)
    size = mask.sum(axis=1, dtype=x.dtype) * x.shape[2]
    return mean, masked_mean(jnp.square(centred), mask).mean(axis=1) * size


def deviation(squares: jax.Array, number: jax.Array) -> jax.Array:
    """The unbiased one, of so many values and the sum of their squares around the mean; of equal values, one.

    Rounding leaves equal values a tiny one, and would decide what is divided by it.
    """
    variance = squares / jnp.maximum(number - 1, 1)
    return jnp.where(variance > MIN_VARIANCE, jnp.sqrt(jnp.maximum(variance, MIN_VARIANCE)), 1.0)


def combined_moments(number: jax.Array, mean: jax.Array, squares: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Those of several parts together (Chan et al., 1983): how many values, mean and squares, [n, B] -> [B] each."""
    total = number.sum(axis=0)
    overall = (number * mean).sum(axis=0) / jnp.maximum(total, 1)
    between = (number * jnp.square(mean - overall[None])).sum(axis=0)
    return total, overall, squares.sum(axis=0) + between


@dataclasses.dataclass(frozen=True)
class Windows:
    """Embeddings of windows of a clip, whose spectrograms are normalised by what they have in common.

    Attributes:
        hop: samples from one window to the next.
        size: samples of a window.
        before: samples of a window before its place; what lies before the clip is silence.
        columns: of a window's spectrogram.
        at_once: columns in a block, roughly, those of all clips counted together.
    """

    hop: int
    size: int
    before: int
    columns: int
    at_once: int

    def __call__(
        self,
        audio: jax.Array,
        counts: jax.Array,
        number: int,
        logarithm: Callable[[jax.Array, jax.Array], jax.Array],
        statistics: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
        embed: Callable[[jax.Array], jax.Array],
        options: Options,
    ) -> jax.Array:
        """Embed some windows at a time: first their mean and deviation, then what they embed to.

        Args:
            audio: [B, N], zero past a clip's end.
            counts: [B] int32, windows of each clip.
            number: T, of windows.
            logarithm: (samples [W, size], lengths [W]) -> spectrograms [W, columns, M].
            statistics: of all windows of each clip (how many values, mean, squares around it, [B] each) -> what is
                taken off, and what is divided by.
            embed: normalised spectrograms [W, columns, M] -> [W, D].
            options: of the encoder.

        Returns:
            [B, T, D].
        """
        B = len(audio)
        blocks, size = even_blocks(number, max(1, self.at_once // (self.columns * B)))
        end = max(0, (blocks * size - 1) * self.hop + self.size - self.before - audio.shape[1])
        padded = jnp.pad(audio, ((0, 0), (self.before, end)))
        places = np.arange(size, dtype=np.int32)[:, None] * self.hop
        index = places + np.arange(self.size, dtype=np.int32)[None, :]

        def over_windows(function: Callable[[jax.Array, jax.Array], Any]) -> Any:
            """A function of the spectrograms [B, size * columns, M] of some windows, and of the first's number."""

            def block(start: jax.Array) -> Any:
                span = (size - 1) * self.hop + self.size
                some = jax.lax.dynamic_slice_in_dim(padded, self.hop * start, span, axis=1)[:, index]
                some = some.reshape(B * size, self.size)
                x = logarithm(some, jnp.full(len(some), self.size, jnp.int32))
                return function(x.reshape(B, size * self.columns, -1), start)

            return jax.lax.map(options.rematerialise(block), size * jnp.arange(blocks, dtype=jnp.int32))

        def some_moments(x: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            # Column by column: sums of few numbers round less.
            mask = jnp.repeat(places_within(start, size, counts), self.columns, axis=1)
            return mask.sum(axis=1, dtype=x.dtype) * x.shape[2], *moments(x, mask)

        mean, spread = statistics(*combined_moments(*over_windows(some_moments)))

        def embedded(x: jax.Array, start: jax.Array) -> jax.Array:
            x = (x - mean[:, None, None]) / spread[:, None, None]
            return embed(x.reshape(B * size, self.columns, -1)).reshape(B, size, -1)

        x = over_windows(embedded)  # [blocks, B, size, D]
        return x.swapaxes(0, 1).reshape(B, blocks * size, -1)[:, :number]
