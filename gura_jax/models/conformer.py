"""Conformer blocks, as wav2vec2-conformer and w2v-BERT have them: convolutions beside attention.

Paper: Conformer (Gulati et al., 2020).
"""

import functools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gura_jax.models.attention import RelativeBias, over_neighbours
from gura_jax.models.convnets import places_within
from gura_jax.models.encoder import Options
from gura_jax.models.transformer import (
    ACTIVATIONS,
    Attention,
    Dropout,
    FeedForward,
    Transformer,
    TransformerEncoder,
    dropouts,
    layer_norm,
)

WAVELENGTH = 10_000.0  # of the slowest sinusoid, in frames over 2 pi


class RotaryAttention(Attention):
    """Self-attention whose queries and keys are projected from input that is turned by its place.

    Rotary position embeddings (Su et al., 2021) turn the queries and keys themselves; these networks do not.
    """

    @staticmethod
    def positions(config: Any, num_frames: int) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines [T, D / H] of each place, of angles in float32, as PyTorch has them."""
        size = config.hidden_size // config.num_attention_heads
        exponents = np.arange(0, size, 2).astype(np.float32) / np.float32(size)
        speeds = 1 / np.power(config.rotary_embedding_base, exponents.astype(np.float64)).astype(np.float32)
        angles = jnp.arange(num_frames, dtype=jnp.float32)[:, None] * speeds[None, :]
        angles = jnp.concatenate([angles, angles], axis=1)
        return jnp.cos(angles), jnp.sin(angles)

    def project(self, x: jax.Array, shared: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """With the cosines and sines of all places, [T, D / H] each."""
        cos, sin = (each[None, :, None, :] for each in shared)
        heads = x.reshape(*x.shape[:2], self.num_heads, -1)
        first, second = jnp.split(heads, 2, axis=-1)
        turned = (heads * cos + jnp.concatenate([-second, first], axis=-1) * sin).reshape(x.shape)
        return self.q_proj(turned), self.k_proj(turned), self.v_proj(x)


class RelativeAttention(Attention):
    """Self-attention with relative positions as in Transformer-XL (Dai et al., 2019)."""

    def __init__(self, config: Any, options: Options, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, options, rngs=rngs)
        size, shape = config.hidden_size, (config.num_attention_heads, config.hidden_size // config.num_attention_heads)
        self.linear_pos = nnx.Linear(size, size, use_bias=False, dtype=options.compute_dtype, rngs=rngs)
        self.pos_bias_u, self.pos_bias_v = (nnx.Param(jnp.zeros(shape, jnp.float32)) for _ in range(2))

    @staticmethod
    def positions(config: Any, num_frames: int) -> jax.Array:
        """Sines and cosines in turn, [2 T - 1, D], of the relative positions 1 - T to T - 1 of a key.

        Of angles in float32, as PyTorch has them; a key before the query has a positive place.
        """
        size = config.hidden_size
        exponents = np.arange(0, size, 2).astype(np.float32) * np.float32(-np.log(WAVELENGTH) / size)
        speeds = np.exp(exponents.astype(np.float64)).astype(np.float32)
        places = jnp.arange(num_frames - 1, -num_frames, -1, dtype=jnp.float32)
        angles = places[:, None] * speeds[None, :]
        return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(len(angles), size)

    def project(self, x: jax.Array, shared: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries with the bias for what keys are."""
        q, k, v = super().project(x, shared)
        return q + self.pos_bias_u[...].reshape(-1).astype(q.dtype)[None, None, :], k, v

    def bias(self, x: jax.Array, q: jax.Array, shared: jax.Array) -> RelativeBias:
        """Products with the projected sinusoids [2 T - 1, D], of queries with the bias for where keys are."""
        table = self.linear_pos(shared)
        own = (self.pos_bias_v[...] - self.pos_bias_u[...]).astype(q.dtype)[None, None, :, :]
        return _products(q + own, table.reshape(len(table), self.num_heads, -1))


class RelativeKeyAttention(Attention):
    """Self-attention with an embedding for each distance, as in Shaw et al. (2018), but for the values' part."""

    def __init__(self, config: Any, options: Options, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, options, rngs=rngs)
        reach = config.left_max_position_embeddings, config.right_max_position_embeddings
        size = config.hidden_size // config.num_attention_heads
        self.distance_embedding = nnx.Embed(sum(reach) + 1, size, rngs=rngs)

    @staticmethod
    def positions(config: Any, num_frames: int) -> np.ndarray:
        """Which embedding [2 T - 1] the relative positions 1 - T to T - 1 of a key have."""
        left, right = config.left_max_position_embeddings, config.right_max_position_embeddings
        return np.clip(np.arange(1 - num_frames, num_frames, dtype=np.int32), -left, right) + left

    def bias(self, x: jax.Array, q: jax.Array, shared: np.ndarray) -> RelativeBias:
        """Products with the embeddings of the distances [2 T - 1]."""
        return _products(q, self.distance_embedding.embedding[...].astype(q.dtype)[shared][:, None, :])


def _products(q: jax.Array, table: jax.Array) -> RelativeBias:
    """Of queries [B, T, H, K] with a table by relative position, [2 T - 1, H or 1, K], scaled as all scores are."""
    return RelativeBias(q * np.asarray(q.shape[-1] ** -0.5, q.dtype), table)


ATTENTIONS: Mapping[str, Any] = MappingProxyType(
    {"rotary": RotaryAttention, "relative": RelativeAttention, "relative_key": RelativeKeyAttention}
)


class ConvolutionModule(nnx.Module):
    """Pointwise convolution with gates, depthwise convolution, norm, activation, pointwise convolution.

    Attributes:
        causal: whether the depthwise convolution sees what precedes a frame alone.
        norm: (size, epsilon, rngs) -> what follows it.
        epsilon: of the norms.
    """

    causal: bool
    norm: Any

    def __init__(self, config: Any, options: Options, epsilon: float, *, rngs: nnx.Rngs) -> None:
        size, dtype = config.hidden_size, options.compute_dtype
        self.activation, self.tokens = ACTIVATIONS[config.hidden_act], options.platform.tokens
        self.layer_norm = layer_norm(size, epsilon, rngs)
        self.pointwise_conv1 = nnx.Linear(size, 2 * size, use_bias=False, dtype=dtype, rngs=rngs)
        self.depthwise_conv = nnx.Conv(
            size, size, config.conv_depthwise_kernel_size, feature_group_count=size, use_bias=False, rngs=rngs
        )
        self.depthwise_norm = self.norm(size, epsilon, rngs)
        self.pointwise_conv2 = nnx.Linear(size, size, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """[B, T, D], [B, T] -> [B, T, D]; what follows a clip counts as zero, as if it stood alone."""
        kernel = self.depthwise_conv.kernel[...][:, 0].astype(jnp.float32)  # [K, D]
        K = len(kernel)
        before = K - 1 if self.causal else K // 2
        counts = mask.sum(axis=1, dtype=jnp.int32)

        def some(x: jax.Array, start: jax.Array) -> jax.Array:
            inside = places_within(start, x.shape[1], counts)
            x, gate = jnp.split(self.pointwise_conv1(self.layer_norm(x)).astype(jnp.float32), 2, axis=-1)
            x = jnp.where(inside[:, :, None], x * jax.nn.sigmoid(gate), 0.0)
            T = x.shape[1] - (K - 1)
            # XLA gathers a sharded batch for a convolution in groups.
            x = functools.reduce(jnp.add, (kernel[k][None, None, :] * x[:, k : k + T] for k in range(K)))
            return self.pointwise_conv2(self.activation(self.depthwise_norm(x))).astype(jnp.float32)

        return over_neighbours(some, x, before, K - 1 - before, self.tokens)


class ConformerLayer(nnx.Module):
    """A Conformer block: half a feed-forward layer, attention, convolutions, and the other half.

    Attributes:
        convolution_class: of its convolutions.
    """

    convolution_class: type[ConvolutionModule]

    def __init__(self, config: Any, options: Options, *, rngs: nnx.Rngs) -> None:
        size, epsilon = config.hidden_size, config.block_norm_eps
        self.ffn1_layer_norm, self.self_attn_layer_norm, self.ffn2_layer_norm, self.final_layer_norm = (
            layer_norm(size, epsilon, rngs) for _ in range(4)
        )
        self.ffn1, self.ffn2 = (FeedForward(config, options, rngs=rngs) for _ in range(2))
        self.attention = ATTENTIONS[config.position_embeddings_type](config, options, rngs=rngs)
        self.conv_module = self.convolution_class(config, options, epsilon, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array, shared: Any, dropout: Dropout | None = None) -> jax.Array:
        """[B, T, D], [B, T], what all blocks share -> [B, T, D]."""
        drop = dropouts(dropout, 4)
        x = x + 0.5 * drop[0](self.ffn1(self.ffn1_layer_norm(x)))
        x = x + drop[1](self.attention(self.self_attn_layer_norm(x), mask, shared))
        x = x + drop[2](self.conv_module(x, mask))
        x = x + 0.5 * drop[3](self.ffn2(self.ffn2_layer_norm(x)))
        return self.final_layer_norm(x)


class ConformerTransformer(Transformer):
    """Conformer blocks, which share what their positions are made of; and a layer norm of the last state, if any."""

    def __init__(self, config: Any, options: Options, num_blocks: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, options, num_blocks, rngs=rngs)
        self.config = config

    def shared(self, num_frames: int) -> Any:
        """See the attention's ``positions``."""
        return ATTENTIONS[self.config.position_embeddings_type].positions(self.config, num_frames)


def always_scans(config: Any) -> bool:
    """Whether each block computes a table of its own from its weights alone: unrolled, XLA makes all at the start."""
    return config.position_embeddings_type == "relative"


def block_faults(config: Any) -> Iterator[str]:
    """What is wrong with the sizes of Conformer blocks, once all are positive integers."""
    if config.conv_depthwise_kernel_size % 2 == 0:
        yield f"conv_depthwise_kernel_size: expected an odd number, found {config.conv_depthwise_kernel_size}"
    if config.position_embeddings_type == "rotary" and config.hidden_size // config.num_attention_heads % 2:
        yield f"hidden_size: expected an even number for each head, found {config.hidden_size}"
    if config.position_embeddings_type == "relative" and config.hidden_size % 2:
        yield f"hidden_size: expected an even number, found {config.hidden_size}"


PARTITION: Mapping[str, int] = MappingProxyType(
    {
        **TransformerEncoder.partition,
        r"encoder\.layers\..*linear_pos\.kernel": -1,
        r"encoder\.layers\..*pos_bias_[uv]": -2,
    }
)
