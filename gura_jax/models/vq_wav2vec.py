"""vq-wav2vec, and wav2vec before it: convolutions, a codebook, and causal convolutions over the codes.

Follows fairseq's ``Wav2VecModel`` for a clip by itself; each of its norms takes statistics over all features and all
frames, here those of each clip. What it quantises jumps where two codes are about as near: a clip's frames there are as
PyTorch's but for those codes. Papers: wav2vec (Schneider et al., 2019), vq-wav2vec (Baevski et al., 2020).
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx

from gura_jax.convert.vq_wav2vec import KEYS
from gura_jax.errors import SystemConfigError
from gura_jax.models.attention import over_frames
from gura_jax.models.config import EncoderConfig
from gura_jax.models.convnets import combined_moments, moments
from gura_jax.models.encoder import (
    Family,
    FrameGrid,
    ModuleEncoder,
    Options,
    Output,
    Params,
    Preset,
    frame_mask,
    normalised,
)
from gura_jax.models.layers import layer_weights, weighted_sum
from gura_jax.models.transformer import ACTIVATIONS
from gura_jax.models.wav2vec2 import convolution_for
from gura_jax.models.wav2vec2_config import receptive_field

NORM_EPS = 1e-5  # PyTorch's default
INNER = 2  # times the features: width of the layers before the codes' scores


@dataclasses.dataclass(frozen=True)
class VqWav2VecConfig(EncoderConfig):
    """Sizes and kinds, by fairseq's names where it has some; defaults are those of vq-wav2vec with Gumbel softmax."""

    model_types: ClassVar[tuple[str, ...]] = ("vq-wav2vec",)
    activations: ClassVar[tuple[str, ...]] = ("activation",)

    model_type: str = "vq-wav2vec"
    conv_dim: tuple[int, ...] = (512,) * 8
    conv_kernel: tuple[int, ...] = (10, 8, 4, 4, 4, 1, 1, 1)
    conv_stride: tuple[int, ...] = (5, 4, 2, 2, 2, 1, 1, 1)
    activation: str = "gelu"
    log_compression: bool = False  # of the features
    vq_type: Literal["gumbel", "kmeans", "none"] = "gumbel"
    vq_vars: int = 320  # codes
    vq_groups: int = 2  # of features, each with a code
    vq_depth: int = 2  # layers that score the codes (gumbel)
    combine_groups: bool = True  # one codebook for all groups
    aggregator_kernel: tuple[int, ...] = tuple(range(2, 14))
    aggregator_bias: bool = True
    agg_zero_pad: bool = False  # before the first frame; else copies of it
    skip_connections_agg: bool = True
    residual_scale: float = 0.5  # its root scales the sum with what was skipped

    def _relation_faults(self) -> Iterator[str]:
        sizes = self.conv_dim, self.conv_kernel, self.conv_stride
        if not len(sizes[0]) == len(sizes[1]) == len(sizes[2]) >= 2:
            found = ", ".join(str(len(size)) for size in sizes)
            yield f"conv_dim, conv_kernel, conv_stride: expected as many numbers of each, at least 2, found {found}"
        if self.conv_dim[-1] % self.vq_groups:
            yield f"conv_dim: expected a last one that {self.vq_groups} groups divide, found {self.conv_dim[-1]}"
        if self.residual_scale <= 0:
            yield f"residual_scale: expected a positive number, found {self.residual_scale}"

    def tiny(self) -> Self:
        """A small encoder of the same kind."""
        return dataclasses.replace(
            self,
            conv_dim=(16,) * len(self.conv_dim),
            vq_vars=7,
            aggregator_kernel=self.aggregator_kernel[:3],
        )

    @property
    def hop(self) -> int:
        """Samples from one frame to the next."""
        return math.prod(self.conv_stride)

    @property
    def window(self) -> int:
        """Samples that a frame's features are made of."""
        return receptive_field(self.conv_kernel, self.conv_stride)


class ClipNorm(nnx.Module):
    """Group norm over each clip's own frames and a group's features."""

    def __init__(self, size: int, groups: int = 1, *, rngs: nnx.Rngs) -> None:
        self.groups = groups
        self.scale, self.bias = nnx.Param(jnp.ones(size, jnp.float32)), nnx.Param(jnp.zeros(size, jnp.float32))

    def moments(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """How many values of each group count, their mean and the squares around it: [B] and twice [B, G]."""
        parts = [moments(part, mask) for part in jnp.split(x, self.groups, axis=-1)]
        number = mask.sum(axis=1, dtype=x.dtype) * (x.shape[-1] // self.groups)
        return number, jnp.stack([mean for mean, _ in parts], axis=-1), jnp.stack([s for _, s in parts], axis=-1)

    def apply(self, x: jax.Array, number: jax.Array, mean: jax.Array, squares: jax.Array) -> jax.Array:
        """[B, T, D] normalised by these."""
        size = x.shape[-1] // self.groups
        variance = squares / jnp.maximum(number, 1)[:, None]
        mean, factor = (jnp.repeat(y, size, axis=1)[:, None, :] for y in (mean, jax.lax.rsqrt(variance + NORM_EPS)))
        return (x - mean) * (factor * self.scale[...][None, None, :]) + self.bias[...][None, None, :]

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """[B, T, D], [B, T] -> [B, T, D]."""
        return self.apply(x, *self.moments(x, mask))


class Layer(nnx.Module):
    """Convolution, norm, activation."""

    def __init__(
        self, sizes: tuple[int, int], kernel: int, stride: int, bias: bool, config: VqWav2VecConfig, options: Options,
        *, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        self.kernel, self.stride, self.activation = kernel, stride, ACTIVATIONS[config.activation]
        convolve = convolution_for(options)
        self.conv = nnx.Conv(
            *sizes, kernel, strides=stride, padding="VALID", use_bias=bias, dtype=options.compute_dtype, rngs=rngs,
            conv_general_dilated=lambda x, kernel, strides, *_, **__: convolve(x, kernel, *strides),
        )  # fmt: skip
        self.norm = ClipNorm(sizes[1], rngs=rngs)

    def counts(self, counts: jax.Array) -> jax.Array:
        """Frames that come of so many."""
        return jnp.maximum((counts - self.kernel) // self.stride + 1, 0)

    def convolve(self, x: jax.Array) -> jax.Array:
        """[B, T, C] -> [B, T', C'], before the norm."""
        return self.conv(x).astype(jnp.float32)

    def __call__(self, x: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, T, C] and frames [B] of each clip -> [B, T', C'] and theirs."""
        x, counts = self.convolve(x), self.counts(counts)
        return self.activation(self.norm(x, frame_mask(counts, x.shape[1]))), counts


class GumbelQuantizer(nnx.Module):
    """The code of the highest score, for each group."""

    def __init__(self, config: VqWav2VecConfig, options: Options, *, rngs: nnx.Rngs) -> None:
        size, self.groups, dtype = config.conv_dim[-1], config.vq_groups, options.compute_dtype
        self.activation = ACTIVATIONS[config.activation]
        sizes = [size, *(INNER * size,) * (config.vq_depth - 1)]
        self.hidden = nnx.List(nnx.Linear(a, b, dtype=dtype, rngs=rngs) for a, b in itertools.pairwise(sizes))
        self.scores = nnx.Linear(sizes[-1], self.groups * config.vq_vars, dtype=dtype, rngs=rngs)
        self.books = 1 if config.combine_groups else self.groups
        self.codes = nnx.Param(jax.random.uniform(rngs.params(), (1, self.books * config.vq_vars, size // self.groups)))

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        y = x
        for layer in self.hidden:
            y = self.activation(layer(y))
        scores = self.scores(y).astype(jnp.float32)
        codes = self.codes[...].reshape(self.books, -1, self.codes.shape[-1])
        return _chosen(scores.reshape(*x.shape[:2], self.groups, -1), codes).reshape(x.shape)


class KmeansQuantizer(nnx.Module):
    """The nearest code, for each group."""

    def __init__(self, config: VqWav2VecConfig, options: Options, *, rngs: nnx.Rngs) -> None:
        size, self.groups = config.conv_dim[-1], config.vq_groups
        part = size // self.groups
        self.projection = nnx.Conv(size, size, 1, feature_group_count=self.groups, use_bias=False, rngs=rngs)
        self.norm = ClipNorm(size, self.groups, rngs=rngs)
        books = 1 if config.combine_groups else self.groups
        self.codes = nnx.Param(0.01 * jax.random.normal(rngs.params(), (books, config.vq_vars, part)))

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """[B, T, D], [B, T] -> [B, T, D]."""
        B, T, D = x.shape
        kernel = self.projection.kernel[...][0].reshape(D // self.groups, self.groups, -1)  # [in, G, out]
        x = jnp.einsum("btgi,igo->btgo", x.reshape(B, T, self.groups, -1), kernel).reshape(B, T, D)
        x = self.norm(x, mask)
        heads, codes = x.reshape(B, T, self.groups, -1), self.codes[...]
        # The nearest has the highest: what the distances have in common is left out.
        scores = _products(heads, codes) - jnp.square(codes).sum(axis=-1)[None, None] / 2
        chosen = _chosen(scores, codes).reshape(x.shape)
        return jax.lax.stop_gradient(chosen) + (x - jax.lax.stop_gradient(x))  # in training, too, straight through


def _products(heads: jax.Array, codes: jax.Array) -> jax.Array:
    """[B, T, G, K] and [G or 1, V, K] -> [B, T, G, V]."""
    return jnp.einsum("btgk,gvk->btgv", heads, jnp.broadcast_to(codes, (heads.shape[2], *codes.shape[1:])))


def _chosen(scores: jax.Array, codes: jax.Array) -> jax.Array:
    """Scores [B, T, G, V] of codes [G or 1, V, K] -> [B, T, G, K], those of the highest; the first of equal ones.

    The gradient is that of the softmax of the scores.
    """
    hard = jax.nn.one_hot(scores.argmax(axis=-1), scores.shape[-1], dtype=scores.dtype)
    soft = jax.nn.softmax(scores)
    weights = hard + (soft - jax.lax.stop_gradient(soft))
    # One of the products is of a one, and must not be rounded.
    books = jnp.broadcast_to(codes, (scores.shape[2], *codes.shape[1:]))
    return jnp.einsum("btgv,gvk->btgk", weights, books, precision="highest")


_QUANTIZERS: dict[str, Any] = {"gumbel": GumbelQuantizer, "kmeans": KmeansQuantizer, "none": lambda *_, **__: None}


class Features(NamedTuple):
    """What the convolutions make of clips."""

    values: jax.Array  # [B, T, D]
    counts: jax.Array  # [B]


class VqWav2Vec(nnx.Module):
    """Convolutions, quantiser, aggregator."""

    def __init__(self, config: VqWav2VecConfig, options: Options, *, rngs: nnx.Rngs) -> None:
        self.config, self.options = config, options
        inputs = (1, *config.conv_dim)
        self.convolutions = nnx.List(
            Layer((inputs[i], size), config.conv_kernel[i], config.conv_stride[i], False, config, options, rngs=rngs)
            for i, size in enumerate(config.conv_dim)
        )
        self.quantizer = _QUANTIZERS[config.vq_type](config, options, rngs=rngs)
        self.aggregator = nnx.List(
            Layer(
                (config.conv_dim[-1], config.conv_dim[-1]),
                kernel,
                1,
                config.aggregator_bias,
                config,
                options,
                rngs=rngs,
            )
            for kernel in config.aggregator_kernel
        )

    def compressed(self, x: jax.Array) -> jax.Array:
        """What the last convolution's output becomes."""
        return jnp.log(jnp.abs(x) + 1) if self.config.log_compression else x

    def features(self, audio: jax.Array, lengths: jax.Array) -> Features:
        """Of audio [B, N]; the first convolution's output, by far the longest, only in blocks."""
        first, second, *others = self.convolutions
        counts = first.counts(lengths)
        block, rematerialise = self.options.platform.frames, self.options.rematerialise
        frames = (audio.shape[1] - first.kernel) // first.stride + 1

        def first_moments(samples: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            x = first.convolve(samples[:, :, None])
            return first.norm.moments(x, frame_mask(counts - start, x.shape[1]))

        size = block * self.config.hop // first.stride
        number, mean, squares = over_frames(
            rematerialise(first_moments), audio, frames, first.kernel, first.stride, size
        )
        number, mean, squares = combined_moments(number.T, mean[..., 0].T, squares[..., 0].T)
        statistics = number, mean[:, None], squares[:, None]

        def both(samples: jax.Array, start: jax.Array) -> jax.Array:
            x = first.activation(first.norm.apply(first.convolve(samples[:, :, None]), *statistics))
            return second.convolve(x)

        hop = first.stride * second.stride
        window = first.kernel + (second.kernel - 1) * first.stride
        frames = (audio.shape[1] - window) // hop + 1
        x = over_frames(rematerialise(both), audio, frames, window, hop, block * self.config.hop // hop)
        x = x.reshape(len(audio), -1, x.shape[-1])[:, :frames]
        counts = second.counts(counts)
        x = second.activation(second.norm(x, frame_mask(counts, frames)))
        for layer in others:
            x, counts = layer(x, counts)
        return Features(self.compressed(x), counts)

    def states(self, x: jax.Array, counts: jax.Array) -> Iterator[jax.Array]:
        """What the aggregator takes of the features [B, T, D], and what each of its layers returns."""
        mask = frame_mask(counts, x.shape[1])
        x = x if self.quantizer is None else self.quantizer(x, mask)
        yield x
        for layer in self.aggregator:
            padding = ((0, 0), (layer.kernel - 1, 0), (0, 0))
            y = layer.convolve(jnp.pad(x, padding, mode="constant" if self.config.agg_zero_pad else "edge"))
            y = layer.activation(layer.norm(y, mask))
            x = (y + x) * self.config.residual_scale**0.5 if self.config.skip_connections_agg else y
            yield x


class VqWav2VecEncoder(ModuleEncoder):
    """vq-wav2vec as a member: a frame every 10 ms; its states are the codes, and the aggregator's layers."""

    config: VqWav2VecConfig

    def __init__(self, config: VqWav2VecConfig, options: Options) -> None:
        super().__init__(config, options)
        layer_weights(options.layers, len(config.aggregator_kernel))  # refuses layers that do not exist
        self.grid = FrameGrid(config.hop, config.window / 2, config.window)
        if options.hop is not None:
            raise SystemConfigError(f"hop: {config.model_type} has a frame every {config.hop} samples, and no choice")
        self.sample_rate, self.feature_size = 16_000, config.conv_dim[-1]
        self.num_states = len(config.aggregator_kernel) + 1
        self.parts = (
            *(f"convolution {i}" for i in range(len(config.conv_dim))),
            *(f"state {i}" for i in range(self.num_states)),
        )

    def module(self, rngs: nnx.Rngs) -> VqWav2Vec:
        """The network with fresh weights."""
        return VqWav2Vec(self.config, self.options, rngs=rngs)

    def _given(self, audio: jax.Array, lengths: jax.Array) -> jax.Array:
        return normalised(audio, lengths) if self.options.normalise else audio

    def __call__(self, params: Params, audio: jax.Array, lengths: jax.Array) -> Output:
        """The chosen states' sum."""
        network: VqWav2Vec = self.network(params)
        features, counts = network.features(self._given(audio, lengths), lengths)
        weights = layer_weights(self.options.layers, self.num_states - 1)
        return Output(weighted_sum(network.states(features, counts), weights), counts)

    def states(
        self, params: Params, audio: jax.Array, lengths: jax.Array
    ) -> Iterator[tuple[str, jax.Array, jax.Array]]:
        """Each convolution's output, whole, and the states."""
        network: VqWav2Vec = self.network(params)
        x, counts = self._given(audio, lengths)[:, :, None], lengths
        for i, layer in enumerate(network.convolutions):
            x, counts = layer(x, counts)
            yield f"convolution {i}", x, counts
        for i, state in enumerate(network.states(network.compressed(x), counts)):
            yield f"state {i}", state, counts


_WAV2VEC = VqWav2VecConfig(
    conv_dim=(512,) * 7,
    conv_kernel=(10, 8, 4, 4, 4, 1, 1),
    conv_stride=(5, 4, 2, 2, 2, 1, 1),
    activation="relu",
    log_compression=True,
    vq_type="none",
)

VQ_WAV2VEC = Family(
    name="vq-wav2vec",
    config=VqWav2VecConfig,
    build=VqWav2VecEncoder,
    keys=KEYS,
    reference="gura_jax.convert.references.VqWav2Vec",
    presets={  # fairseq's files, on no hub in a layout of its own
        "vq-wav2vec": Preset(VqWav2VecConfig(), licence="MIT"),
        "vq-wav2vec-kmeans": Preset(VqWav2VecConfig(vq_type="kmeans"), licence="MIT"),
        "wav2vec-large": Preset(_WAV2VEC, licence="MIT"),
    },
)
