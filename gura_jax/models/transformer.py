"""Transformer blocks, as several families have them, and the base of encoders made of such blocks."""

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gura_jax.models.attention import RelativeBias, attention, over_tokens
from gura_jax.models.encoder import Functional, ModuleEncoder, Noise, Options, Params, functional
from gura_jax.models.layers import layer_weights, sum_of_states


def gelu(x: jax.Array) -> jax.Array:
    """By erf, as PyTorch has it; ``jax.nn.gelu`` takes erfc, which takes longer."""
    half, root = (jnp.asarray(value, x.dtype) for value in (0.5, math.sqrt(0.5)))
    return half * x * (1 + jax.lax.erf(x * root))


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


def layer_norm(size: int, epsilon: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """In float32, with the variance as PyTorch computes it."""
    return nnx.LayerNorm(size, epsilon=epsilon, use_fast_variance=False, dtype=jnp.float32, rngs=rngs)


class Attention(nnx.Module):
    """Multi-head self-attention over each clip's own frames.

    Attributes:
        biases: of the queries, keys, values and the output. (A bias of the keys changes no softmax.)
    """

    biases: tuple[bool, bool, bool, bool] = (True, True, True, True)

    def __init__(self, config: Any, options: Options, *, rngs: nnx.Rngs) -> None:
        size = config.hidden_size
        self.num_heads, self.platform = config.num_attention_heads, options.platform
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nnx.Linear(size, size, use_bias=bias, dtype=options.compute_dtype, rngs=rngs) for bias in self.biases
        )

    def __call__(self, x: jax.Array, mask: jax.Array, shared: Any) -> jax.Array:
        """[B, T, D], [B, T] -> [B, T, D]; ``shared`` is for :meth:`bias`."""
        B, T, D = x.shape
        q, k, v = (p(x).reshape(B, T, self.num_heads, -1) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = attention(q, k, v, mask, self.platform, self.bias(x, q, shared))  # [B, T, H, D / H]
        return self.out_proj(out.reshape(B, T, D)).astype(jnp.float32)

    def bias(self, x: jax.Array, q: jax.Array, shared: Any) -> RelativeBias | None:
        """What is added to the scores; here nothing.

        Args:
            x: the input [B, T, D].
            q: its queries [B, T, H, D / H].
            shared: by all blocks.
        """
        return None


class FeedForward(nnx.Module):
    """Linear, activation, linear."""

    def __init__(self, config: Any, options: Options, *, rngs: nnx.Rngs) -> None:
        size, inner, dtype = config.hidden_size, config.intermediate_size, options.compute_dtype
        self.activation, self.tokens = ACTIVATIONS[config.hidden_act], options.platform.tokens
        self.intermediate_dense = nnx.Linear(size, inner, dtype=dtype, rngs=rngs)
        self.output_dense = nnx.Linear(inner, size, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        def some(x: jax.Array) -> jax.Array:
            return self.output_dense(self.activation(self.intermediate_dense(x))).astype(jnp.float32)

        return over_tokens(some, x, self.tokens)


class Dropout(NamedTuple):
    """Sets a share of the values to zero, and scales the others up."""

    key: jax.Array
    share: jax.Array  # []

    def __call__(self, x: jax.Array) -> jax.Array:
        kept = jax.random.bernoulli(self.key, 1.0 - self.share, x.shape)
        return jnp.where(kept, x / (1.0 - self.share), 0.0)


def _dropouts(dropout: Dropout | None, number: int) -> list[Callable[[jax.Array], jax.Array]]:
    """Independent ones, or functions that change nothing."""
    if dropout is None:
        return [lambda x: x] * number
    return [Dropout(key, dropout.share) for key in jax.random.split(dropout.key, number)]


class EncoderLayer(nnx.Module):
    """A transformer block; layer norm after each part (post-norm) or before it (``do_stable_layer_norm``)."""

    attention_class: type[Attention] = Attention

    def __init__(self, config: Any, options: Options, *, rngs: nnx.Rngs) -> None:
        self.pre_norm = config.do_stable_layer_norm
        self.attention = self.attention_class(config, options, rngs=rngs)
        self.layer_norm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs)
        self.feed_forward = FeedForward(config, options, rngs=rngs)
        self.final_layer_norm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array, shared: Any, dropout: Dropout | None = None) -> jax.Array:
        """[B, T, D], [B, T], what all blocks share -> [B, T, D]."""
        drop = _dropouts(dropout, 2)
        if self.pre_norm:
            x = x + drop[0](self.attention(self.layer_norm(x), mask, shared))
            return x + drop[1](self.feed_forward(self.final_layer_norm(x)))
        x = self.layer_norm(x + drop[0](self.attention(x, mask, shared)))
        return self.final_layer_norm(x + drop[1](self.feed_forward(x)))


def mask_spans(key: jax.Array, shape: tuple[int, int], share: float, length: int) -> jax.Array:
    """[B, N] True within random spans: each place begins one with a probability of share / length."""
    begins = jax.random.bernoulli(key, min(1.0, share / length), shape).astype(jnp.int32)
    begun = jnp.cumsum(begins, axis=1)
    return begun > jnp.pad(begun, ((0, 0), (length, 0)))[:, : shape[1]]  # within the last so many places


class TransformerEncoder(ModuleEncoder):
    """Base of encoders with transformer blocks of one shape.

    Attributes:
        layer_class: of the blocks, which the network has as a list at ``blocks``.
        config: has ``hidden_size``, ``num_hidden_layers`` and ``do_stable_layer_norm``, and what ``layer_class`` takes.
        last_norm: dotted path of the layer norm after the last block, in pre-norm networks.
    """

    layer_class: type[EncoderLayer] = EncoderLayer
    last_norm = "layer_norm"
    # Heads and inner features are divided; the products that bring them together again are summed over the devices.
    partition = MappingProxyType(
        {
            r"(encoder\.)?layers\..*[qkv]_proj\.(kernel|bias)": -1,
            r"(encoder\.)?layers\..*out_proj\.kernel": -2,
            r"(encoder\.)?layers\..*intermediate_dense\.(kernel|bias)": -1,
            r"(encoder\.)?layers\..*output_dense\.kernel": -2,
        }
    )

    def __init__(self, config: Any, options: Options) -> None:
        super().__init__(config, options)
        layer_weights(options.layers, config.num_hidden_layers)  # refuses layers that do not exist
        self.feature_size = config.hidden_size
        self.num_states = config.num_hidden_layers + 1

    def network_of(self, num_blocks: int, rngs: nnx.Rngs) -> nnx.Module:
        """The network with so many blocks, with fresh weights."""
        raise NotImplementedError

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """The network with fresh weights."""
        return self.network_of(self.config.num_hidden_layers, rngs)

    def without_blocks(self, params: Params) -> Any:
        """The network with these weights, but for its blocks, inside a compiled function."""
        return _without_blocks(self).merge(params)

    def disturb(self, x: jax.Array, noise: Noise | None) -> tuple[jax.Array, Dropout | None]:
        """What the blocks are given, with spans of it masked; and the dropout of each block."""
        if noise is None:
            return x, None
        B, T, D = x.shape
        by_time, by_feature, by_block = jax.random.split(noise.key, 3)
        frames = mask_spans(by_time, (B, T), noise.mask_time, noise.mask_time_length)
        features = mask_spans(by_feature, (B, D), noise.mask_features, noise.mask_features_length)
        x = jnp.where(frames[:, :, None] | features[:, None, :], 0.0, x)
        if not noise.dropout:
            return x, None
        keys = jax.random.split(by_block, self.config.num_hidden_layers)
        return x, Dropout(keys, jnp.full(len(keys), noise.dropout, jnp.float32))

    def sum_of_states(
        self,
        params: Params,
        x: jax.Array,
        mask: jax.Array,
        shared: Any,
        finish: Callable[[jax.Array], jax.Array],
        dropouts: Dropout | None,
    ) -> jax.Array:
        """The chosen layers of the blocks' states, [B, T, D].

        Args:
            params: the encoder's.
            x: the first state [B, T, D].
            mask: [B, T], of the frames that count.
            shared: what all blocks share.
            finish: from the last block's output to the last state.
            dropouts: of each block.
        """

        def block(arguments: tuple[Params, Dropout | None], x: jax.Array) -> jax.Array:
            own, dropout = arguments
            return _block(self).merge(own)(x, mask, shared, dropout)

        weights = layer_weights(self.options.layers, self.config.num_hidden_layers)
        blocks = self.block_arguments(params, dropouts)
        return sum_of_states(self.options.rematerialise(block), x, blocks, weights, finish)

    def depths(self, params: Params) -> Mapping[str, np.ndarray]:
        """By the block; the layer norm after the last one is part of it."""
        depths = dict(super().depths(params))
        if self.config.do_stable_layer_norm:
            last = np.asarray(self.config.num_hidden_layers, np.int32)
            depths |= {name: last for name in depths if name.startswith(f"{self.last_norm}.")}
        return depths


@functools.cache
def _without_blocks(encoder: TransformerEncoder) -> Functional:
    return functional(functools.partial(encoder.network_of, 0))


@functools.cache
def _block(encoder: TransformerEncoder) -> Functional:
    return functional(lambda rngs: encoder.layer_class(encoder.config, encoder.options, rngs=rngs))
