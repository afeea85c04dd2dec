"""Transformer blocks, as several families have them, and the base of encoders made of such blocks."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gura_jax.errors import SystemConfigError
from gura_jax.models.attention import RelativeBias, attention, over_tokens
from gura_jax.models.encoder import (
    FrameGrid,
    Functional,
    ModuleEncoder,
    Noise,
    Options,
    Output,
    Params,
    Reduce,
    functional,
)
from gura_jax.models.layers import Collect, layer_weights, sum_of_states


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
        """[B, T, D], [B, T] -> [B, T, D]; ``shared`` is for :meth:`project` and :meth:`bias`."""
        B, T, D = x.shape
        q, k, v = (y.reshape(B, T, self.num_heads, -1) for y in self.project(x, shared))
        out = attention(q, k, v, mask, self.platform, self.bias(x, q, shared))  # [B, T, H, D / H]
        return self.out_proj(out.reshape(B, T, D)).astype(jnp.float32)

    def project(self, x: jax.Array, shared: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values, [B, T, D] each."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

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


def dropouts(dropout: Dropout | None, number: int) -> list[Callable[[jax.Array], jax.Array]]:
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
        drop = dropouts(dropout, 2)
        if self.pre_norm:
            x = x + drop[0](self.attention(self.layer_norm(x), mask, shared))
            return x + drop[1](self.feed_forward(self.final_layer_norm(x)))
        x = self.layer_norm(x + drop[0](self.attention(x, mask, shared)))
        return self.final_layer_norm(x + drop[1](self.feed_forward(x)))


class Transformer(nnx.Module):
    """Blocks, and a layer norm, if any: of the last state in pre-norm networks, else of the first."""

    layer_class: Any = EncoderLayer
    has_norm: bool = True

    def __init__(self, config: Any, options: Options, num_blocks: int, *, rngs: nnx.Rngs) -> None:
        self.pre_norm = config.do_stable_layer_norm
        self.layer_norm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs) if self.has_norm else _same
        self.layers = nnx.List(self.layer_class(config, options, rngs=rngs) for _ in range(num_blocks))

    def start(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """The first state [B, T, D], from what comes before; ``mask`` [B, T] says which frames count."""
        return x if self.pre_norm else self.layer_norm(x)

    def shared(self, num_frames: int) -> Any:
        """What all blocks compute with beside their own weights; here nothing."""
        return None

    def finish(self, x: jax.Array) -> jax.Array:
        """The last state, from the last block's output."""
        return self.layer_norm(x) if self.pre_norm else x

    def __call__(self, x: jax.Array, mask: jax.Array) -> Iterator[jax.Array]:
        """The L + 1 hidden states, one by one."""
        x, shared = self.start(x, mask), self.shared(x.shape[1])
        yield x
        for i, layer in enumerate(self.layers, 1):
            x = layer(x, mask, shared)
            yield self.finish(x) if i == len(self.layers) else x


def _same(x: jax.Array) -> jax.Array:
    return x


def mask_spans(key: jax.Array, shape: tuple[int, int], share: float, length: int) -> jax.Array:
    """[B, N] True within random spans: each place begins one with a probability of share / length."""
    begins = jax.random.bernoulli(key, min(1.0, share / length), shape).astype(jnp.int32)
    begun = jnp.cumsum(begins, axis=1)
    return begun > jnp.pad(begun, ((0, 0), (length, 0)))[:, : shape[1]]  # within the last so many places


class TransformerEncoder(ModuleEncoder):
    """Base of encoders with transformer blocks of one shape.

    A family's encoder adds :meth:`inputs`, :meth:`states`, sizes, and :meth:`outputs` where what the blocks take is not
    one state a frame.

    Attributes:
        network_class: (config, options, number of blocks) -> a module with ``encoder``, a transformer of its
            ``transformer_class``.
        config: has ``hidden_size``, ``num_hidden_layers`` and ``do_stable_layer_norm``, and what the blocks take.
    """

    network_class: Any
    blocks = "encoder.layers"
    # Heads and inner features are divided; the products that bring them together again are summed over the devices.
    partition = MappingProxyType(
        {
            r"encoder\.layers\..*[qkv]_proj\.(kernel|bias)": -1,
            r"encoder\.layers\..*out_proj\.kernel": -2,
            r"encoder\.layers\..*intermediate_dense\.(kernel|bias)": -1,
            r"encoder\.layers\..*output_dense\.kernel": -2,
        }
    )

    def __init__(self, config: Any, options: Options, grid: FrameGrid) -> None:
        super().__init__(config, options)
        layer_weights(options.layers, config.num_hidden_layers)  # refuses layers that do not exist
        if options.hop is not None:
            raise SystemConfigError(f"hop: {config.model_type} has a frame every {grid.hop} samples, and no choice")
        self.grid = grid
        self.feature_size = config.hidden_size
        self.num_states = config.num_hidden_layers + 1

    def network_of(self, num_blocks: int, rngs: nnx.Rngs) -> Any:
        """The network with so many blocks, with fresh weights."""
        return self.network_class(self.config, self.options, num_blocks, rngs=rngs)

    def module(self, rngs: nnx.Rngs) -> Any:
        """The network with fresh weights."""
        return self.network_of(self.config.num_hidden_layers, rngs)

    def abstract_params(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every weight in a checkpoint, from one block: tracing all of them takes long."""
        blocks = {
            f"{self.blocks}.{i}.{name}": shape
            for i in range(self.config.num_hidden_layers)
            for name, shape in _block(self).abstract.items()
        }
        return _without_blocks(self).abstract | blocks

    def without_blocks(self, params: Params) -> Any:
        """The network with these weights, but for its blocks, inside a compiled function."""
        return _without_blocks(self).merge(params)

    def inputs(self, network: Any, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the transformer takes, from audio [B, N]: x [B', T', D], and the mask [B', T'] of what counts in it."""
        raise NotImplementedError

    def outputs(self, x: jax.Array, audio: jax.Array, lengths: jax.Array) -> Output:
        """The results, from the chosen states' sum [B', T', D]."""
        return Output(x, self.grid.count(lengths))

    def __call__(self, params: Params, audio: jax.Array, lengths: jax.Array) -> Output:
        """Frames [B, T, D] and counts [B]; the layers' weighted sum is a running one."""
        return self._embed(params, audio, lengths, None)

    def disturbed(self, params: Params, audio: jax.Array, lengths: jax.Array, noise: Noise) -> Output:
        """The same with masked spans of what the transformer takes, and dropout in the blocks."""
        return self._embed(params, audio, lengths, noise)

    def collected(
        self, params: Params, audio: jax.Array, lengths: jax.Array, states: tuple[int, ...], reduce: Reduce
    ) -> tuple[Output, jax.Array]:
        """The same, and hidden states, each reduced as it comes."""

        def reduced(state: jax.Array) -> jax.Array:
            out = self.outputs(state, audio, lengths)
            return reduce(out.frames, out.counts)

        network = self.without_blocks(params)
        x, mask = self.inputs(network, audio, lengths)
        x, kept = self.chosen_states(params, network.encoder, x, mask, collect=Collect(states, reduced))
        assert kept is not None  # as they are asked for
        return self.outputs(x, audio, lengths), kept

    def _embed(self, params: Params, audio: jax.Array, lengths: jax.Array, noise: Noise | None) -> Output:
        network = self.without_blocks(params)
        x, mask = self.inputs(network, audio, lengths)
        x, dropouts = (x, None) if noise is None else self._disturb(x, noise)
        return self.outputs(self.chosen_states(params, network.encoder, x, mask, dropouts)[0], audio, lengths)

    def chosen_states(
        self,
        params: Params,
        transformer: Transformer,
        x: jax.Array,
        mask: jax.Array,
        dropouts: Dropout | None = None,
        collect: Collect | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """The chosen states' sum [B, T, D], from what the transformer takes; and the states to keep [K, ...].

        Args:
            params: the encoder's.
            transformer: without its blocks.
            x: [B, T, D].
            mask: [B, T], of what counts in it.
            dropouts: of each block.
            collect: states to keep.
        """
        x, shared = transformer.start(x, mask), transformer.shared(x.shape[1])

        def block(arguments: tuple[Params, Dropout | None], x: jax.Array) -> jax.Array:
            own, dropout = arguments
            return _block(self).merge(own)(x, mask, shared, dropout)

        weights = layer_weights(self.options.layers, self.config.num_hidden_layers)
        blocks = self.block_arguments(params, dropouts)
        return sum_of_states(self.options.rematerialise(block), x, blocks, weights, transformer.finish, collect)

    def _disturb(self, x: jax.Array, noise: Noise) -> tuple[jax.Array, Dropout | None]:
        """Mask spans of [B', T', D]; and the dropout of each block."""
        B, T, D = x.shape
        by_time, by_feature, by_block = jax.random.split(noise.key, 3)
        frames = mask_spans(by_time, (B, T), noise.mask_time, noise.mask_time_length)
        features = mask_spans(by_feature, (B, D), noise.mask_features, noise.mask_features_length)
        x = jnp.where(frames[:, :, None] | features[:, None, :], 0.0, x)
        if not noise.dropout:
            return x, None
        keys = jax.random.split(by_block, self.config.num_hidden_layers)
        return x, Dropout(keys, jnp.full(len(keys), noise.dropout, jnp.float32))

    def depths(self, params: Params) -> Mapping[str, np.ndarray]:
        """By the block; the layer norm after the last one is part of it."""
        depths = dict(super().depths(params))
        if self.config.do_stable_layer_norm:
            last = np.asarray(self.config.num_hidden_layers, np.int32)
            depths |= {name: last for name in depths if name.startswith("encoder.layer_norm.")}
        return depths


@functools.cache
def _without_blocks(encoder: TransformerEncoder) -> Functional:
    return functional(functools.partial(encoder.network_of, 0))


@functools.cache
def _block(encoder: TransformerEncoder) -> Functional:
    layer = encoder.network_class.transformer_class.layer_class
    return functional(lambda rngs: layer(encoder.config, encoder.options, rngs=rngs))
