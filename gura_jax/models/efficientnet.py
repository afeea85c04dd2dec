"""EfficientNet-B2 as its HEAR submission embeds: a scene for each clip, and a timestamp embedding every 10 ms.

Follows the submission ``efficient_latent`` for a clip by itself; there the floor of a batch's spectrograms is that of
the loudest clip. Papers: EfficientNet (Tan and Le, 2019); the submission is by H. Dinkel (Xiaomi).
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx

from gura_jax.convert.efficientnet import KEYS
from gura_jax.models.config import EncoderConfig
from gura_jax.models.convnets import batch_norm, refuse_options, repeated, within
from gura_jax.models.convolution import depthwise_by_taps
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
from gura_jax.models.spectrogram import Spectrogram, cut_off_below, decibels

SAMPLE_RATE = 16_000  # Hz
MELS, HOP = 64, 160
RANGE = 120.0  # dB below a clip's loudest value, at which it is cut off
BATCH_NORM_EPS = 1e-3
STRIDE = 32  # columns of a segment
IMAGE_SIZE = 260  # pixels, of the pictures that the padding is computed for
_SPECTROGRAM = Spectrogram(MELS, "htk", 0, 8000, 512, 512, HOP)


class Stage(NamedTuple):
    """Blocks of one shape; the first has the stride."""

    blocks: int
    kernel: int
    stride: int
    expand: int
    size: int


STAGES = (
    Stage(2, 3, 1, 1, 16),
    Stage(3, 3, 2, 6, 24),
    Stage(3, 5, 2, 6, 48),
    Stage(4, 3, 2, 6, 88),
    Stage(4, 5, 1, 6, 120),
    Stage(5, 5, 2, 6, 208),
    Stage(2, 3, 1, 6, 352),
)
STEM, HEAD = 32, 1408


@dataclasses.dataclass(frozen=True)
class EfficientNetConfig(EncoderConfig):
    """Blocks and sizes; defaults are those of B2."""

    model_types: ClassVar[tuple[str, ...]] = ("efficientnet_b2",)
    activations: ClassVar[tuple[str, ...]] = ()

    model_type: str = "efficientnet_b2"
    blocks: tuple[int, ...] = tuple(stage.blocks for stage in STAGES)  # of each stage
    sizes: tuple[int, ...] = (STEM, *(stage.size for stage in STAGES), HEAD)

    def _relation_faults(self) -> Iterator[str]:
        if (len(self.blocks), len(self.sizes)) != (len(STAGES), len(STAGES) + 2):
            yield (
                f"blocks, sizes: expected {len(STAGES)} and {len(STAGES) + 2} numbers, found {len(self.blocks)} and "
                f"{len(self.sizes)}"
            )

    def tiny(self) -> Self:
        """A small encoder of the same kind."""
        return dataclasses.replace(self, blocks=(1, 2, 1, 1, 1, 1, 1), sizes=(4, 4, 6, 6, 8, 8, 10, 10, 16))


class Window(NamedTuple):
    """A convolution's, along time and bands alike."""

    kernel: int
    stride: int
    before: int  # zeros
    after: int

    def columns(self, columns: jax.Array) -> jax.Array:
        """Columns of the result."""
        return (columns + self.before + self.after - self.kernel) // self.stride + 1


def windows(config: EfficientNetConfig) -> list[Window]:
    """Of the stem, and of each block: TensorFlow's padding for a picture, whatever the spectrogram's length."""
    found = []
    size = IMAGE_SIZE
    shapes = [(3, 2)]
    for stage, number in zip(STAGES, config.blocks, strict=True):
        shapes += [(stage.kernel, stage.stride), *((stage.kernel, 1),) * (number - 1)]
    for kernel, stride in shapes:
        missing = max(0, (-(-size // stride) - 1) * stride + kernel - size)
        found.append(Window(kernel, stride, missing // 2, missing - missing // 2))
        size = -(-size // stride)
    return found


class Convolution(nnx.Module):
    """A convolution without bias, batch norm, and swish if asked for."""

    def __init__(
        self,
        in_size: int,
        size: int,
        window: Window,
        options: Options,
        *,
        groups: int = 1,
        swish: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        self.window, self.swish = window, swish
        self.by_taps = groups > 1 and options.platform.depthwise_by_taps
        around = (window.before, window.after)
        self.conv = nnx.Conv(
            in_size, size, (window.kernel,) * 2, strides=window.stride, padding=(around, around),
            feature_group_count=groups, use_bias=False, dtype=options.compute_dtype, rngs=rngs,
        )  # fmt: skip
        self.norm = batch_norm(size, rngs, BATCH_NORM_EPS)

    def __call__(self, x: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, T, M, C], [B] -> [B, T', M', C'], [B]; zero past each clip's end."""
        if self.by_taps:
            kernel, around = self.conv.kernel[...].astype(jnp.float32), (self.window.before, self.window.after)
            x = depthwise_by_taps(x, kernel, self.window.stride, around)
        else:
            x = self.conv(x)
        x, counts = self.norm(x), self.window.columns(counts)
        x = jax.nn.silu(x) if self.swish else x
        return within(x, frame_mask(counts, x.shape[1])), counts


_POINT = Window(1, 1, 0, 0)


class Block(nnx.Module):
    """An inverted bottleneck: wider, a convolution of each channel, squeeze and excitation, narrower."""

    def __init__(
        self,
        in_size: int,
        size: int,
        expand: int,
        window: Window,
        options: Options,
        *,
        skips: bool,
        rngs: nnx.Rngs,
    ) -> None:
        inner, squeezed = in_size * expand, max(1, in_size // 4)
        self.skips = skips
        self.expand = Convolution(in_size, inner, _POINT, options, rngs=rngs) if expand > 1 else None
        self.depthwise = Convolution(inner, inner, window, options, groups=inner, rngs=rngs)
        dtype = options.compute_dtype
        self.reduce = nnx.Linear(inner, squeezed, dtype=dtype, rngs=rngs)
        self.excite = nnx.Linear(squeezed, inner, dtype=dtype, rngs=rngs)
        self.project = Convolution(inner, size, _POINT, options, swish=False, rngs=rngs)

    def __call__(self, x: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, T, M, C], [B] -> [B, T', M', C'], [B]."""
        own = x
        if self.expand is not None:
            x, _ = self.expand(x, counts)
        x, counts = self.depthwise(x, counts)
        mean = masked_mean(x.mean(axis=2), frame_mask(counts, x.shape[1]))  # [B, C]
        gate = jax.nn.sigmoid(self.excite(jax.nn.silu(self.reduce(mean))).astype(jnp.float32))
        x, counts = self.project(x * gate[:, None, None, :], counts)
        return (own + x if self.skips else x), counts


class EfficientNet(nnx.Module):
    """Stem, blocks, head."""

    def __init__(self, config: EfficientNetConfig, options: Options, *, rngs: nnx.Rngs) -> None:
        first, *others = windows(config)
        stem, *sizes, head = config.sizes
        self.stem = Convolution(1, stem, first, options, rngs=rngs)
        blocks, in_size = [], stem
        for stage, number, size in zip(STAGES, config.blocks, sizes, strict=True):
            for i in range(number):
                window = others[len(blocks)]
                blocks.append(Block(in_size, size, stage.expand, window, options, skips=i > 0, rngs=rngs))
                in_size = size
        self.blocks = nnx.List(blocks)
        self.head = Convolution(in_size, head, _POINT, options, rngs=rngs)

    def segments(self, mel: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, F, M] and columns [B] -> [B, T, D] and segments [B]."""
        x, counts = self.stem(mel[..., None], counts)
        for block in self.blocks:
            x, counts = block(x, counts)
        x, counts = self.head(x, counts)
        return x.mean(axis=2), counts


class EfficientNetEncoder(ModuleEncoder):
    """EfficientNet-B2 as a member; pooled: the submission's scene, the mean of the segments."""

    config: EfficientNetConfig

    def __init__(self, config: EfficientNetConfig, options: Options) -> None:
        super().__init__(config, options)
        refuse_options(config.model_type, options, HOP)
        self.sample_rate, self.grid = SAMPLE_RATE, FrameGrid(HOP, 0.0, 0)
        self.shortest = _SPECTROGRAM.shortest
        self.feature_size = self.pooled_size = config.sizes[-1]
        self.parts = ("log-mel", "segments", "frames")

    def module(self, rngs: nnx.Rngs) -> EfficientNet:
        """The network with fresh weights."""
        return EfficientNet(self.config, self.options, rngs=rngs)

    def __call__(self, params: Params, audio: jax.Array, lengths: jax.Array) -> Output:
        """Frames [B, T, D], counts [B] and pooled [B, D]."""
        segments, counts = self.network(params).segments(*self._log_mel(audio, lengths))
        frames = self._frames(segments, counts, lengths, self.grid.count(audio.shape[1]))
        scene = masked_mean(segments, frame_mask(counts, segments.shape[1]))
        return Output(frames, self.grid.count(lengths), scene)

    def states(
        self, params: Params, audio: jax.Array, lengths: jax.Array
    ) -> Iterator[tuple[str, jax.Array, jax.Array]]:
        """The spectrogram in dB, the network's output every 320 ms, and the frames."""
        mel, columns = self._log_mel(audio, lengths)
        yield "log-mel", mel, columns
        segments, counts = self.network(params).segments(mel, columns)
        yield "segments", segments, counts
        yield "frames", self._frames(segments, counts, lengths, self.grid.count(audio.shape[1])), columns

    def _log_mel(self, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, F, 64] in dB, zero past each clip's columns, and their number."""
        counts = _SPECTROGRAM.count(lengths)
        x = decibels(_SPECTROGRAM(audio, lengths, self.options.platform))
        return cut_off_below(x, counts, RANGE), counts

    def _frames(self, segments: jax.Array, counts: jax.Array, lengths: jax.Array, number: int) -> jax.Array:
        """Each segment 32 times, cut off at both ends to the clip's columns: [B, number, D]."""
        spare = jnp.maximum(counts * STRIDE // 2 - _SPECTROGRAM.count(lengths) // 2, 0)
        return repeated(segments, counts, spare, number, STRIDE)


EFFICIENTNET = Family(
    name="efficientnet_b2",
    config=EfficientNetConfig,
    build=EfficientNetEncoder,
    keys=KEYS,
    reference="gura_jax.convert.references.EfficientNet",
    presets={"efficientnet-b2": Preset(EfficientNetConfig(), licence="Apache-2.0")},  # effb2.pt of its repository
)
